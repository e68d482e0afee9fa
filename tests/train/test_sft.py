"""Fine-tuning on instructions: loss, init_from, LISA."""

import json
import shutil
from functools import cache, partial

import pytest
import torch
from run_files import copy_checkpoints, history, last, losses, weights

from cod_lightning.cli import main
from cod_lightning.commands.fit import train_run
from cod_lightning.config.compose import compose
from cod_lightning.config.schema import OptimConfig
from cod_lightning.data.tokenizers import train_bpe
from cod_lightning.errors import UserError
from cod_lightning.train.checkpoint import list_checkpoints, read_checkpoint
from cod_lightning.train.optim import frozen_blocks
from cod_lightning.train.run import build_data_and_module
from command_words import run_command


@pytest.fixture(scope="module")
def tuning(toy):
    """Overrides for a run of seconds on generated questions; its data is prepared once."""
    dropped = ("data=", "data.files=", "data.vocab_size", "data.seq_len")
    overrides = ["data=drawn_instructions", "data.vocab_size=512", "data.seq_len=80", "data.val_tokens=3000"]
    return [*(word for word in toy if not word.startswith(dropped)), *overrides, "trainer.stats_every=0"]


@pytest.fixture(scope="module")
def tune_in(tuning):
    """`tune_in(folder, *overrides)` trains on generated questions and returns record and run folder."""
    return lambda folder, *overrides: train_run(compose([*tuning, f"output={folder}", *overrides]))


@pytest.fixture
def tune(tune_in, tmp_path):
    return partial(tune_in, tmp_path)


@pytest.fixture(scope="module")
def tune_shared(tune_in, tmp_path_factory):
    """As `tune`, for fixtures that several tests read."""
    return partial(tune_in, tmp_path_factory.mktemp("shared"))


# --- the loss of answers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tokens", "micro_batches"])
def one_step(request, tuning, tune_shared):
    """Weighting and record of one step at lr 1e-30, and the data and the module of the run."""
    weighting = f"optim.weighting={request.param}"
    overrides = ["data.micro_batch_size=4", weighting, "trainer.max_steps=1", "optim.lr=1e-30"]
    record, _ = tune_shared(*overrides, f"name={request.param}")
    data, module = build_data_and_module(compose([*tuning, *overrides]))
    module.configure_model()
    return request.param, record, data, module


@torch.no_grad()
def answers(data, module, sequences):
    """For each stored sequence, loss and correctness of the prediction of each answer token."""
    result = []
    for *ids, start in sequences.tolist():
        logs = module.decoder(torch.tensor([ids]))[0].double().log_softmax(-1)
        positions = range(start - 1, ids.index(data.tokenizer.eos_id))
        result.append([(-float(logs[p, ids[p + 1]]), int(logs[p].argmax()) == ids[p + 1]) for p in positions])
    return result


def test_the_training_loss_averages_answer_tokens_by_weighting(one_step):
    weighting, record, data, module = one_step
    step = answers(data, module, next(iter(data.train_dataloader())))
    first, second = ([loss for answer in part for loss, _ in answer] for part in (step[:4], step[4:]))
    if weighting == "tokens":
        expected = (sum(first) + sum(second)) / (len(first) + len(second))
    else:
        expected = (sum(first) / len(first) + sum(second) / len(second)) / 2
    assert losses(record)[0] == pytest.approx(expected, rel=1e-5)


def test_the_validation_loss_is_the_mean_over_answer_tokens(one_step):
    _, record, data, module = one_step
    held_out = answers(data, module, data.val_set.read(torch.arange(data.val_count).numpy()))
    tokens = sum(map(len, held_out))
    assert record["val_tokens"] == tokens
    assert record["val_loss"] == pytest.approx(sum(loss for a in held_out for loss, _ in a) / tokens, rel=1e-5)


def test_accuracy_is_the_percentage_of_exact_answers(one_step):
    _, record, data, module = one_step
    held_out = answers(data, module, data.val_set.read(torch.arange(data.val_count).numpy()))
    assert record["accuracy"] == 100 * sum(all(hit for _, hit in answer) for answer in held_out) / len(held_out)


def test_micro_batches_and_padding_do_not_change_a_run(tune):
    whole, parts = (tune(f"data.micro_batch_size={size}", f"name=micro{size}")[0] for size in (8, 2))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for name in ("val_loss", "accuracy", "tokens"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


@pytest.fixture(scope="module")
def learned(tune_shared):
    overrides = ["trainer.max_steps=250", "data.batch_size=16", "optim.lr=0.004", "data.val_tokens=1000000"]
    return tune_shared(*overrides, "eval.every=1000", "trainer.checkpoint_every=1000", "name=learned")


def test_a_run_learns_the_questions(learned):
    record, _ = learned
    # Guessing gives 37.5%, and five standard errors of 400 answers are 12.5%; four seeds gave 63 to 87%.
    assert record["accuracy"] > 50
    assert record["history"]["val"]["accuracy"] == [record["accuracy"]]


def test_evaluate_prints_the_accuracy_of_the_record(learned, capsys):
    record, folder = learned
    assert main(["evaluate", str(folder)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(printed["accuracy"]) == pytest.approx(record["accuracy"], rel=1e-5)


# --- init_from --------------------------------------------------------------------------------------------------------

STILL = ("optim.lr=1e-30", "trainer.max_steps=1", "eval.every=1")
"""One step that changes no weight in float32."""


def assert_same_weights(path, source):
    after, before = weights(path), weights(source)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture(scope="module")
def source(tune_shared):
    """Record and folder of a run of three steps."""
    return tune_shared("name=source", "trainer.max_steps=3")


@pytest.fixture(scope="module", params=["run", "file"])
def initialised(request, tune_shared, source):
    """Record and folder of a run that starts from the run folder or from the checkpoint file of `source`."""
    path = source[1] if request.param == "run" else last(source[1])
    return tune_shared(f"name=from_{request.param}", f"init_from={path}", *STILL)


def test_a_run_starts_with_the_weights_of_the_source(source, initialised):
    assert_same_weights(last(initialised[1]), last(source[1]))
    assert initialised[0]["val_loss"] == source[0]["val_loss"]


def test_a_run_records_its_source(source, initialised):
    assert initialised[0]["init_from"] == {"checkpoint": str(last(source[1])), "step": 3}


def test_a_run_from_a_source_starts_at_step_one(source, initialised):
    record, folder = initialised
    assert record["history"]["train"]["step"] == [1]
    assert record["tokens"] < source[0]["tokens"]
    (optimizer,) = read_checkpoint(last(folder))["optimizer_states"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {1}


def test_a_run_uses_the_tokenizer_of_the_source(source, initialised):
    record, folder = initialised
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (folder / "tokenizer" / name).read_bytes() == (source[1] / "tokenizer" / name).read_bytes()
    assert record["config"]["data"]["tokenizer"] == str(source[1] / "tokenizer")


def test_instructions_use_the_vocabulary_of_a_run_on_text(plain, train, tmp_path):
    _, source = plain
    records = [{"instruction": f"the norm of block {n}", "output": "grows with depth"} for n in range(60)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    overrides = ["data=commonsense170k", f"data.files={tmp_path}/records.json", "data.seq_len=256", "data.val_every=10"]
    tuned, folder = train("name=tuned", *overrides, f"init_from={source}", "trainer.max_steps=4", "optim.lr=0.01")
    assert losses(tuned)[-1] < losses(tuned)[0]
    assert tuned["config"]["data"]["vocab_size"] == 300
    assert weights(last(folder))["lm_head.weight"].shape == weights(last(source))["lm_head.weight"].shape


def test_a_run_on_text_starts_from_a_run_on_text(plain, train):
    again, _ = train(f"init_from={plain[1]}", *STILL)
    assert again["val_loss"] == plain[0]["val_loss"]
    assert "accuracy" not in again


def test_init_from_changes_the_run_folder(tuning):
    plain, run, trailing, file = (
        compose([*tuning, *words]).folder
        for words in ([], ["init_from=runs/a"], ["init_from=runs/a/"], ["init_from=runs/b/checkpoints/best.ckpt"])
    )
    assert len({plain, run, file}) == 3
    assert trailing == run


@pytest.fixture(scope="module")
def sources(source, tmp_path_factory):
    """Paths by name: the run, its last checkpoint, and sources that cannot be used."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "stray.ckpt").write_bytes(last(source[1]).read_bytes())
    (folder / "other").mkdir()
    (folder / "other/tokenizer.json").write_text(train_bpe(["other words"], 270).json)
    (folder / "untrained").mkdir()
    return {"tmp": folder, "run": source[1], "last": last(source[1])}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from={tmp}/nowhere"], "nowhere: neither a run folder"),
        (["init_from={tmp}/untrained"], "untrained: neither a run folder"),
        (["init_from={tmp}/untrained/x.ckpt"], r"x\.ckpt: neither a run folder nor a \.ckpt file"),
        (["init_from={tmp}/stray.ckpt"], r"stray\.ckpt: no tokenizer at \S+; name one with data\.tok"),
        (["init_from={run}", "data.tokenizer={tmp}/other"], "is not the tokenizer of init_from="),
        (
            ["init_from={run}", "norm=pre_ln"],
            r"another decoder: add norm=lns norm.position=after_ln, or name its .ckpt",
        ),
        (["init_from={run}", "model.hidden_size=16"], r"another decoder: add model.hidden_size=32, or name"),
        (["init_from={last}", "norm=peri_ln"], r"\d+ parameters have another shape .* is missing in the checkpoint"),
        (["init_from={last}", "model.hidden_size=16"], r"\d+ parameters have another shape than this run's"),
        (
            ["init_from={last}", "model.vocab_size=600"],
            r"2 parameters .*\(lm_head.weight is .*, \[600, 32\] in .*: use model\.vocab_size=\d+$",
        ),
    ],
)
def test_an_unusable_source_is_one_error_and_writes_nothing(tune, tmp_path, sources, overrides, message):
    with pytest.raises(UserError, match=message):
        tune("name=next", *(word.format(**sources) for word in overrides))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_file_can_start_a_run_of_another_norm(tune, sources):
    record, folder = tune(f"init_from={sources['last']}", "norm=pre_ln", *STILL)
    assert record["init_from"]["checkpoint"] == str(sources["last"])
    assert_same_weights(last(folder), sources["last"])


def test_a_checkpoint_file_without_a_run_needs_a_tokenizer(tune, sources):
    stray = sources["tmp"] / "stray.ckpt"
    record, folder = tune(f"init_from={stray}", f"data.tokenizer={sources['run']}/tokenizer", *STILL)
    assert record["init_from"]["checkpoint"] == str(stray)
    assert_same_weights(last(folder), stray)


@pytest.fixture(scope="module")
def without_source(source, tune_shared, tmp_path_factory):
    """Record, folder and overrides of a run whose source has no checkpoint any more."""
    copy = tmp_path_factory.mktemp("sources") / "copy"
    shutil.copytree(source[1], copy)
    overrides = [f"init_from={copy}", "trainer.keep_last=9", "name=whole"]
    record, folder = tune_shared(*overrides)
    shutil.rmtree(copy / "checkpoints")
    return record, folder, overrides


def test_a_run_resumes_without_its_source(tune, tmp_path, without_source):
    whole, folder, overrides = without_source
    copy_checkpoints(folder, tmp_path / "whole", until=2)
    resumed, _ = tune(*overrides)
    assert history(resumed) == history(whole)
    assert resumed["init_from"] == whole["init_from"]


def test_a_failed_retraining_keeps_the_record(tune_shared, without_source):
    _, folder, overrides = without_source
    with pytest.raises(UserError, match="no last checkpoint"):
        tune_shared(*overrides, "resume=false")
    assert (folder / "record.json").exists()


# --- LISA -------------------------------------------------------------------------------------------------------------

LISA = ("optim.lisa_layers=1", "optim.lisa_interval=2", "optim.name=adamw", "optim.weight_decay=0.1", "seed=6")
"""With this seed the first three samples of one block among three are 0, 2 and 1."""
ACTIVE = [{0}, {0}, {2}, {2}, {1}, {1}]
"""The trained blocks of the first six steps."""


@cache
def sampled(seed, steps=10_000):
    """The trained blocks of each step: three of eight, sampled every five steps."""
    config = OptimConfig(lisa_layers=3, lisa_interval=5)
    return [set(range(8)) - set(frozen_blocks(step, 8, config, seed)) for step in range(steps)]


def test_every_step_trains_the_configured_number_of_blocks():
    assert {len(blocks) for blocks in sampled(1)} == {3}


def test_the_blocks_stay_for_an_interval():
    assert all(blocks == sampled(1)[step - step % 5] for step, blocks in enumerate(sampled(1)))


def test_blocks_are_sampled_uniformly():
    samples = sampled(1)[::5]
    for block in range(8):
        assert sum(block in blocks for blocks in samples) / len(samples) == pytest.approx(3 / 8, abs=0.04)
    pairs = sum({0, 7} <= blocks for blocks in samples) / len(samples)
    assert pairs == pytest.approx(3 / 28, abs=0.03)


def test_the_samples_depend_on_the_seed():
    assert sampled(1) != sampled(2)


def test_no_block_is_frozen_without_lisa():
    assert frozen_blocks(7, 8, OptimConfig(), seed=1) == []


def test_the_seed_samples_the_expected_blocks():
    config = OptimConfig(lisa_layers=1, lisa_interval=2)
    assert [set(range(3)) - set(frozen_blocks(step, 3, config, seed=6)) for step in range(6)] == ACTIVE


@pytest.fixture(scope="module")
def lisa(tune_shared):
    """Record and checkpoints of a run that saves every step."""
    overrides = ["trainer.checkpoint_every=1", "trainer.keep_last=99", "data.micro_batch_size=4"]
    record, folder = tune_shared(*LISA, *overrides, "trainer.stats_every=1", "name=lisa")
    return record, list_checkpoints(folder / "checkpoints")


def test_a_step_changes_all_weights_but_those_of_frozen_blocks(lisa):
    _, saved = lisa
    assert len(saved) == 6
    for before, after, active in zip(saved, saved[1:], ACTIVE[1:], strict=False):
        old, new = weights(before), weights(after)
        for name in old:
            is_frozen = ".layers." in name and int(name.split(".")[2]) not in active
            assert torch.equal(old[name], new[name]) == is_frozen, name


def test_the_optimizer_counts_the_steps_of_each_block(lisa):
    _, saved = lisa
    for number, path in enumerate(saved, 1):
        state = read_checkpoint(path)["optimizer_states"][0]["state"]
        counts = [sum(block in active for active in ACTIVE[:number]) for block in range(3)]
        # Embeddings, head and final norm train in every step, and the nine parameters of a block if it is sampled.
        expected = sorted([number] * 3 + [count for count in counts if count for _ in range(9)])
        assert sorted(int(entry["step"]) for entry in state.values()) == expected


def test_the_optimizer_keeps_the_state_of_frozen_blocks(lisa):
    first, final = (read_checkpoint(path)["optimizer_states"][0]["state"] for path in (lisa[1][0], lisa[1][-1]))
    assert first.keys() <= final.keys()


def test_gradient_norms_of_frozen_blocks_are_measured(lisa):
    assert all(norm > 0 for norms in lisa[0]["history"]["layers"]["gradient_norm"] for norm in norms)


def test_lisa_with_all_blocks_is_full_fine_tuning(tune):
    full, _ = tune("name=full")
    sampled, _ = tune("name=sampled", "optim.lisa_layers=3")
    assert history(sampled) == history(full)


def test_a_run_resumed_between_two_samples_is_bit_identical(tune, tmp_path):
    words = [*LISA, "optim.lisa_interval=3", "trainer.max_steps=8", "trainer.keep_last=9"]
    whole, folder = tune("name=whole", *words)
    copy_checkpoints(folder, tmp_path / "parts", until=4)
    resumed, parts = tune("name=parts", *words)
    assert history(resumed) == history(whole)
    expected, actual = weights(last(folder)), weights(last(parts))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_more_blocks_than_the_model_has_is_an_error(tuning):
    with pytest.raises(UserError, match=r"optim\.lisa_layers=4 is more than model\.num_hidden_layers=3"):
        compose([*tuning, "optim=lisa"])


def test_lisa_options_out_of_range_are_errors(tuning):
    with pytest.raises(UserError, match=r"(?s)lisa_layers=-1 must be at least 0.*lisa_interval=0 must be at least 1"):
        compose([*tuning, "optim.lisa_layers=-1", "optim.lisa_interval=0"])


@pytest.fixture(scope="module")
def ranks(tuning, tune_shared, tmp_path_factory):
    """Run folders of the same run in one process and on two ranks."""
    overrides = [*LISA, "data.micro_batch_size=2", "trainer.max_steps=4", "trainer.checkpoint_every=1"]
    _, one = tune_shared("name=one", *overrides)
    output = tmp_path_factory.mktemp("ranks")
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", f"output={output}", "name=two"]
    process = run_command("fit", *tuning, *overrides, *ddp)
    assert process.returncode == 0, process.stderr
    return one, output / "two"


def test_two_ranks_report_the_metrics_of_one_process(ranks):
    one, two = (json.loads((folder / "record.json").read_text()) for folder in ranks)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for name in ("val_loss", "ppl_paper_protocol", "accuracy", "tokens", "val_tokens"):
        assert two[name] == pytest.approx(one[name], rel=1e-5)


def test_two_ranks_train_the_blocks_of_one_process(ranks):
    for pair in zip(*(list_checkpoints(folder / "checkpoints") for folder in ranks), strict=True):
        states = [read_checkpoint(path)["optimizer_states"][0]["state"] for path in pair]
        one, two = ({number: int(entry["step"]) for number, entry in state.items()} for state in states)
        assert one == two
