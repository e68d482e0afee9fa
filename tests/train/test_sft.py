"""Fine-tuning: the loss of answers, starting from another run, sampled layers, and that questions are learned."""

import json
import os
import subprocess
import sys

import pytest
import torch

from cod_lightning.cli import main
from cod_lightning.config.compose import compose
from cod_lightning.config.schema import OptimConfig
from cod_lightning.data.tokenizers import train_bpe
from cod_lightning.errors import UserError
from cod_lightning.nn.decoder import Decoder
from cod_lightning.train.checkpoint import checkpoints, read_checkpoint
from cod_lightning.train.optim import frozen_blocks
from cod_lightning.train.run import build


@pytest.fixture(scope="session")
def tuning(toy):
    """Overrides for a run of seconds on drawn questions; its data is prepared once for the whole session."""
    kept = [word for word in toy if not word.startswith(("data=", "data.files=", "data.vocab_size", "data.seq_len"))]
    words = ["data=drawn_instructions", "data.vocab_size=512", "data.seq_len=80", "data.val_tokens=3000"]
    return [*kept, *words, "trainer.stats_every=0"]


@pytest.fixture
def tune(tuning, tmp_path):
    """As `train`, on drawn questions."""
    from cod_lightning.commands.fit import train_run

    def run(*overrides):
        return train_run(compose([*tuning, f"output={tmp_path}", *overrides]))

    return run


def losses(record):
    return record["history"]["train"]["loss"]


def weights(checkpoint):
    return {k.removeprefix("decoder."): v for k, v in read_checkpoint(checkpoint)["state_dict"].items()}


def history(record):
    """What is the same however often a run is stopped."""
    return {
        kind: {name: values for name, values in series.items() if name != "tokens_per_second"}
        for kind, series in record["history"].items()
    }


# --- the loss of answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["tokens", "micro_batches"])
def test_the_loss_is_that_of_the_answers_tokens(tuning, tune, weighting):
    words = ["data.micro_batch_size=4", f"optim.weighting={weighting}", "trainer.max_steps=1", "optim.lr=1e-30"]
    record, _ = tune(*words)
    data, module = build(compose([*tuning, *words]))
    module.configure_model()

    @torch.no_grad()
    def by_hand(rows):
        """Loss and exactness of each answer, one token after the other."""
        found = []
        for row in rows.tolist():
            *ids, start = row
            end = ids.index(data.eos_id)
            logs = module.decoder(torch.tensor([ids]))[0].double().log_softmax(-1)
            places = range(start - 1, end)
            found.append([(-float(logs[p, ids[p + 1]]), int(logs[p].argmax()) == ids[p + 1]) for p in places])
        return found

    step = by_hand(next(iter(data.train_dataloader())))
    first, second = ([loss for answer in part for loss, _ in answer] for part in (step[:4], step[4:]))
    if weighting == "tokens":
        expected = (sum(first) + sum(second)) / (len(first) + len(second))
    else:
        expected = (sum(first) / len(first) + sum(second) / len(second)) / 2
    assert losses(record)[0] == pytest.approx(expected, rel=1e-5)
    held = by_hand(data.val_rows.read(torch.arange(data.val_count).numpy()))
    assert record["val_tokens"] == sum(map(len, held))
    assert record["val_loss"] == pytest.approx(sum(loss for a in held for loss, _ in a) / sum(map(len, held)), rel=1e-5)
    assert record["accuracy"] == 100 * sum(all(hit for _, hit in answer) for answer in held) / len(held)


def test_micro_batches_and_padding_do_not_change_a_run(tune):
    runs = [tune("data.micro_batch_size=8", "name=whole")[0], tune("data.micro_batch_size=2", "name=parts")[0]]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)
    for name in ("val_loss", "accuracy", "tokens"):
        assert runs[1][name] == pytest.approx(runs[0][name], rel=1e-5)


def test_questions_are_learned_and_evaluate_says_so(tune, capsys):
    words = ["trainer.max_steps=250", "data.batch_size=16", "optim.lr=0.004"]
    record, folder = tune(*words, "data.val_tokens=1000000", "eval.every=1000", "trainer.checkpoint_every=1000")
    # Guesses give 0.375 and five standard errors of 400 answers are 0.125; four seeds gave 0.63 to 0.87.
    assert record["accuracy"] > 50
    assert main(["evaluate", str(folder)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(printed["accuracy"]) == pytest.approx(record["accuracy"], rel=1e-5)
    assert record["history"]["val"]["accuracy"] == [record["accuracy"]]


# --- starting from another run ----------------------------------------------------------------------------------------

STILL = ("optim.lr=1e-30", "trainer.max_steps=1", "eval.every=1")
"""A step that changes no weight in float32."""


@pytest.mark.parametrize("of", ["run", "file"])
def test_a_run_starts_from_the_weights_of_another(tune, of):
    first, source = tune("name=source", "trainer.max_steps=3")
    last = checkpoints(source / "checkpoints")[-1]
    record, folder = tune("name=next", f"init_from={source if of == 'run' else last}", *STILL)
    assert record["val_loss"] == first["val_loss"]
    assert record["init_from"] == {"checkpoint": str(last), "step": 3}
    assert record["history"]["train"]["step"] == [1]
    assert record["tokens"] < first["tokens"]
    before, after = weights(last), weights(checkpoints(folder / "checkpoints")[-1])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (optimizer,) = read_checkpoint(folder / "checkpoints/best.ckpt")["optimizer_states"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {1}
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (folder / "tokenizer" / name).read_bytes() == (source / "tokenizer" / name).read_bytes()
    assert record["config"]["data"]["tokenizer"] == str(source / "tokenizer")


def test_text_comes_before_instructions(train, tmp_path):
    """A run on text, then one on instructions in its tokens, then one on text again."""
    first, source = train("name=source")
    records = [{"instruction": f"the norm of block {n}", "output": "grows with depth"} for n in range(60)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    words = ["data=commonsense170k", f"data.files={tmp_path}/records.json", "data.seq_len=256", "data.val_every=10"]
    tuned, folder = train("name=tuned", *words, f"init_from={source}", "trainer.max_steps=4", "optim.lr=0.01")
    assert losses(tuned)[-1] < losses(tuned)[0]
    assert tuned["config"]["data"]["vocab_size"] == 300
    assert len(weights(checkpoints(folder / "checkpoints")[-1])["lm_head.weight"]) == len(
        weights(checkpoints(source / "checkpoints")[-1])["lm_head.weight"]
    )
    again, _ = train("name=again", f"init_from={source}", *STILL)
    assert again["val_loss"] == first["val_loss"]
    assert "accuracy" not in again


def test_what_a_run_starts_from_makes_it_another_run(tuning):
    plain, one, other = (
        compose([*tuning, *words]) for words in ([], ["init_from=runs/a"], ["init_from=runs/b/checkpoints/best.ckpt"])
    )
    assert len({config.folder for config in (plain, one, other)}) == 3
    assert compose([*tuning, "init_from=runs/a/"]).folder == one.folder
    assert one.data.tokenizer == "runs/a/tokenizer"
    assert other.data.tokenizer == "runs/b/tokenizer"
    assert compose([*tuning, "init_from=runs/a", "data.tokenizer=mine"]).data.tokenizer == "mine"


def test_what_cannot_be_started_from_is_one_error_and_nothing_is_written(tune, tmp_path):
    _, source = tune("name=source", "trainer.max_steps=1")
    last = checkpoints(source / "checkpoints")[-1]
    (tmp_path / "stray.ckpt").write_bytes(last.read_bytes())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tokenizer.json").write_text(train_bpe(["other words"], 270).json)
    (tmp_path / "untrained").mkdir()
    before = {path for path in tmp_path.rglob("*") if path.suffix != ".lock"}
    for words, message in (
        ([f"init_from={tmp_path}/nowhere"], "nowhere: no such run folder"),
        ([f"init_from={tmp_path}/untrained"], "untrained: no last checkpoint"),
        ([f"init_from={tmp_path}/untrained/x.ckpt"], r"x\.ckpt: no such run folder or \.ckpt file"),
        ([f"init_from={tmp_path}/stray.ckpt"], r"stray\.ckpt: no tokenizer at \S+; name one with data\.tok"),
        ([f"init_from={source}", f"data.tokenizer={tmp_path}/other"], "is not the tokenizer of init_from="),
        ([f"init_from={source}", "norm=pre_ln"], r"another decoder \(norm.name='lns' there, 'pre_ln' here; .*ckpt"),
        ([f"init_from={source}", "model.hidden_size=16"], r"another decoder \(model.hidden_size=32 there, 16 here\)"),
        ([f"init_from={last}", "norm=peri_ln"], r"\d+ parameters have another shape .* is missing in the checkpoint"),
        ([f"init_from={last}", "model.hidden_size=16"], r"\d+ parameters have another shape than this run's"),
        (
            [f"init_from={last}", "model.vocab_size=600"],
            r"2 parameters .*\(lm_head.weight is \[\d+, 32\] in the checkpoint, \[600",
        ),
    ):
        with pytest.raises(UserError, match=message):
            tune("name=next", *words)
    assert {path for path in tmp_path.rglob("*") if path.suffix != ".lock"} == before
    tune("name=next", f"init_from={last}", "norm=pre_ln", *STILL)
    tune("name=last", f"init_from={tmp_path}/stray.ckpt", f"data.tokenizer={source}/tokenizer", *STILL)


def stopped(folder, step):
    """Put a finished run back to where it had been stopped behind a checkpoint."""
    (folder / "record.json").unlink()
    for path in checkpoints(folder / "checkpoints"):
        if path.name > f"step-{step:08d}.ckpt":
            path.unlink()


def test_a_run_of_its_own_checkpoints_needs_the_source_no_more(tune):
    _, source = tune("name=source", "trainer.max_steps=2")
    words = [f"init_from={source}", "trainer.keep_last=9"]
    whole, _ = tune("name=whole", *words)
    _, folder = tune("name=parts", *words)
    stopped(folder, 2)
    for path in checkpoints(source / "checkpoints"):
        path.unlink()
    again, _ = tune("name=parts", *words)
    assert history(again) == history(whole)
    assert again["init_from"] == whole["init_from"]
    with pytest.raises(UserError, match="no last checkpoint"):
        tune("name=parts", *words, "resume=false")
    assert (folder / "record.json").exists()


# --- sampled layers ---------------------------------------------------------------------------------------------------

LISA = ("optim.lisa_layers=1", "optim.lisa_interval=2", "optim.name=adamw", "optim.weight_decay=0.1", "seed=6")
"""Under this seed the first three draws of one block among three are 0, 2 and 1."""


def test_blocks_are_drawn_uniformly_by_seed_and_step():
    config = OptimConfig(lisa_layers=3, lisa_interval=5)
    drawn = [set(range(8)) - set(frozen_blocks(step, 8, config, seed=1)) for step in range(10_000)]
    assert {len(active) for active in drawn} == {3}
    assert all(drawn[step] == drawn[step - step % 5] for step in range(10_000))
    for block in range(8):
        assert sum(block in active for active in drawn[::5]) / 2_000 == pytest.approx(3 / 8, abs=0.04)
    pairs = sum({0, 7} <= active for active in drawn[::5]) / 2_000
    assert pairs == pytest.approx(3 / 28, abs=0.03)
    assert drawn != [set(range(8)) - set(frozen_blocks(step, 8, config, seed=2)) for step in range(10_000)]
    assert frozen_blocks(7, 8, OptimConfig(), seed=1) == []


def test_only_the_drawn_blocks_change_and_only_their_moments(tune):
    words = ["trainer.checkpoint_every=1", "trainer.keep_last=99", "data.micro_batch_size=4", "trainer.stats_every=1"]
    record, folder = tune(*LISA, *words)
    kept = checkpoints(folder / "checkpoints")
    assert len(kept) == 6
    config = OptimConfig(lisa_layers=1, lisa_interval=2)
    active = [set(range(3)) - set(frozen_blocks(step, 3, config, seed=6)) for step in range(6)]
    assert active == [{0}, {0}, {2}, {2}, {1}, {1}]
    names = list(weights(kept[0]))

    def block_of(name):
        return int(name.split(".")[2]) if ".layers." in name else None

    states = []
    for before, after, blocks in zip(kept, kept[1:], active[1:], strict=False):
        old, new = weights(before), weights(after)
        for name in names:
            assert torch.equal(old[name], new[name]) == (block_of(name) not in (None, *blocks)), name
    for number, path in enumerate(kept, 1):
        state = read_checkpoint(path)["optimizer_states"][0]["state"]
        states.append(state)
        steps = sorted(int(entry["step"]) for entry in state.values())
        # Embeddings, head and final norm take every step, and a block's nine parameters those it was drawn for.
        taken = [sum(block in blocks for blocks in active[:number]) for block in range(3)]
        assert steps == sorted([number] * 3 + [count for count in taken if count for _ in range(9)])
    assert states[0].keys() <= states[-1].keys()
    # Every block's gradient is measured, whether or not it is drawn.
    assert all(norm > 0 for norms in record["history"]["layers"]["gradient_norm"] for norm in norms)


def test_as_many_layers_as_there_are_is_full_fine_tuning(tune):
    full, _ = tune("name=full")
    sampled, _ = tune("name=sampled", "optim.lisa_layers=3")
    assert history(sampled) == history(full)


def test_a_run_stopped_between_draws_ends_to_the_bit_as_if_never_stopped(tune):
    words = [*LISA, "optim.lisa_interval=3", "trainer.max_steps=8", "trainer.keep_last=9"]
    whole, one = tune("name=whole", *words)
    _, folder = tune("name=parts", *words)
    stopped(folder, 4)
    again, _ = tune("name=parts", *words)
    assert history(again) == history(whole)
    expected, found = (weights(checkpoints(f / "checkpoints")[-1]) for f in (one, folder))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_that_failed_in_a_step_can_go_on_to_the_bit(tune, monkeypatch):
    words = [*LISA, "trainer.max_steps=6"]
    whole, _ = tune("name=whole", *words)
    forward, calls = Decoder.forward, []

    def failing(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        if calls.count(True) == 5:
            raise RuntimeError("the machine went away")
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", failing)
        with pytest.raises(RuntimeError, match="the machine went away"):
            tune("name=parts", *words)
    again, _ = tune("name=parts", *words)
    assert history(again) == history(whole)


def test_more_layers_than_there_are_is_refused(tuning):
    with pytest.raises(UserError, match=r"optim\.lisa_layers=4 is more than model\.num_hidden_layers=3"):
        compose([*tuning, "optim=lisa"])
    with pytest.raises(UserError, match=r"(?s)lisa_layers=-1 must be at least 0.*lisa_interval=0 must be at least 1"):
        compose([*tuning, "optim.lisa_layers=-1", "optim.lisa_interval=0"])


def test_two_ranks_compute_what_one_does(tuning, tune, tmp_path):
    words = [*LISA, "data.micro_batch_size=2", "trainer.max_steps=4", "trainer.checkpoint_every=1"]
    expected, one = tune("name=one", *words)
    two = [*tuning, *words, f"output={tmp_path}", "name=two", "trainer=ddp", "trainer.accelerator=cpu"]
    process = subprocess.run(
        [sys.executable, "-m", "cod_lightning", "fit", *two],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "two/record.json").read_text())
    assert (expected["world_size"], found["world_size"]) == (1, 2)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    for name in ("val_loss", "ppl_paper_protocol", "accuracy", "tokens", "val_tokens"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    for path in checkpoints(tmp_path / "two/checkpoints"):
        ours, theirs = (read_checkpoint(folder / path.name) for folder in (one / "checkpoints", path.parent))
        steps = [{k: int(v["step"]) for k, v in c["optimizer_states"][0]["state"].items()} for c in (ours, theirs)]
        assert steps[0] == steps[1]
