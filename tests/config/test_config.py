"""Composition of overrides, errors of bad ones, and run folders."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cod_lightning.config import groups
from cod_lightning.config.compose import choices, compose, parse, sweep
from cod_lightning.config.groups import default_values, describe_settings
from cod_lightning.config.saved import check_init_from, config_from_dict, create_run_folder, load_config, to_yaml
from cod_lightning.config.schema import Config, TrainerConfig, flatten, identity, init_from_run
from cod_lightning.data.config import DataConfig
from cod_lightning.errors import UserError
from cod_lightning.nn.strategies import STRATEGIES, build_all


def test_the_quickstart_is_the_default():
    config = compose()
    assert config.experiment == "quickstart"
    assert config.norm == {"name": "lns", "position": "after_ln"}
    assert config.protocol == "strict"
    assert config.model.num_hidden_layers >= 24


def test_the_help_has_the_default_of_every_field():
    assert default_values() == flatten(asdict(compose()))
    text = describe_settings()
    assert "\n  trainer.max_steps=250\n" in text
    assert re.search(r"^  optim.name=adam +adam, adamw$", text, re.MULTILINE)
    assert re.search(r"^  norm=lns +admin, ", text, re.MULTILINE)


def test_every_strategy_has_its_config_and_every_option_its_default():
    assert set(choices("norm")) == set(STRATEGIES)
    for name in STRATEGIES:
        norm = compose([f"norm={name}"]).norm
        assert build_all(norm, 4) == build_all({"name": name}, 4), name


@pytest.mark.parametrize("word", ["trainer.measures.angular=50", "trainer.measures={angular: 50}"])
def test_a_measure_is_added_to_those_of_the_experiment(tmp_path, word):
    usual = compose().trainer.measures
    config = compose([word, f"output={tmp_path}"])
    assert config.trainer.measures == usual | {"angular": 50}
    create_run_folder(config)
    assert load_config(config.folder, ["trainer.measures.jacobian=0"]).trainer.measures == {
        "jacobian": 0,
        "angular": 50,
    }


def test_the_command_line_wins_over_the_experiment():
    config = compose(["experiments=table1_350m", "model=tiny", "optim.lr=0.01", "data=files", "data.files=x/*.gz"])
    assert config.model.hidden_size == 32
    assert config.optim.lr == 0.01
    assert (config.data.source, config.data.tokenizer) == ("files", "bpe")


@pytest.mark.parametrize(
    "word",
    [
        "trainer.checkpoint_every=7",
        "data.workers=2",
        "data.micro_batch_size=8",
        "trainer.threads=1",
        "trainer.log_every=1",
        "trainer.measures={angular: 50}",
    ],
)
def test_a_runtime_field_leaves_the_run_folder(word):
    assert compose([word]).folder == compose().folder


def test_the_run_folder_does_not_depend_on_the_strategy():
    assert compose(["trainer=fsdp", "data.micro_batch_size=8"]).folder == compose().folder


@pytest.mark.parametrize(
    "word",
    ["seed=2", "data.folder=elsewhere", "norm=pre_ln", "optim.lr=0.1", "trainer.max_steps=9", "data.seq_len=64"],
)
def test_a_field_that_changes_results_changes_the_run_folder(word):
    assert compose([word]).folder != compose().folder


def test_the_micro_batch_size_changes_the_run_folder_under_the_protocol_of_the_paper():
    assert compose(["protocol=paper", "data.micro_batch_size=8"]).folder != compose(["protocol=paper"]).folder


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["norm=pre_ln", "trainer.max_steps=9"], "quickstart"),
        (["model=tiny", "data=files", "data.files=a.txt"], "tiny-files"),
        (["data=c4"], "quickstart-c4"),
        (["task=vision", "model=vit_tiny"], "vit_tiny-drawn"),
        (["experiments=quickstart", "model=tiny"], "quickstart"),
        (["experiments=table1_130m", "scale=toy", "norm=pre_ln"], "table1_130m"),
        (["experiment=mine", "model=tiny"], "mine"),
    ],
    ids=" ".join,
)
def test_a_run_is_named_by_its_experiment_or_by_its_own_model_and_data(words, name):
    config = compose(words)
    assert config.folder.as_posix() == f"runs/{name}/{config.label}"


def test_output_and_name_place_the_run_folder():
    assert compose(["output=/tmp/x"]).folder.parent.parent.as_posix() == "/tmp/x"
    assert compose(["name=mine"]).folder.as_posix() == "runs/mine"


@pytest.mark.parametrize(
    ("words", "replaced"),
    [
        (["experiments=table1_130m", "model=llama_1b"], "model.hidden_size, .* of model=llama_1b"),
        (["data=c4"], "data.source, data.tokenizer of data=c4"),
        (["protocol=paper"], "protocol, data.layout, .* of protocol=paper"),
        (["experiments=table2_250m", "data=docs"], "data.source of data=docs"),
    ],
)
def test_a_scale_does_not_replace_what_the_command_line_chooses(words, replaced):
    with pytest.raises(UserError, match=f"^scale=toy replaces {replaced}: remove one of the two"):
        compose([*words, "scale=toy"])


@pytest.mark.parametrize(
    "words",
    [["trainer=cpu"], ["protocol=strict"], ["norm=pre_ln"], ["data=docs"], ["optim=adamw", "optim.lr=0.1"]],
    ids=" ".join,
)
def test_a_scale_stands_beside_choices_that_it_does_not_change(words):
    assert compose([*words, "scale=toy"]).model.hidden_size == 64


def test_the_run_id_does_not_depend_on_the_spelling_of_a_number_of_norm():
    assert compose(["norm=mix_ln", "norm.fraction=1"]).id == compose(["norm=mix_ln", "norm.fraction=1.0"]).id


def test_the_run_id_does_not_depend_on_file_names_if_their_hash_is_set():
    words = ["data=files", f"data.sha256={'0' * 64}"]
    assert compose([*words, "data.files=a.txt"]).id == compose([*words, "data.files=b.txt"]).id
    assert compose(["data=files", "data.files=a.txt"]).id != compose(["data=files", "data.files=b.txt"]).id


RESULTS = Path(__file__).parents[2] / "experiments/results"
RECORDS = [path for runs in ("toy/*", "small/lns_*") for path in sorted(RESULTS.glob(f"{runs}-seed1-*/record.json"))]


def test_runs_are_recorded():
    assert {path.parts[-3] for path in RECORDS} == {"toy", "small"}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_the_names_of_recorded_runs_are_stable(path):
    assert config_from_dict(json.loads(path.read_text())["config"], path).label == path.parent.name


def test_the_defaults_that_change_results_are_stable():
    """Settings at their default are not in the id of a run: with another default, two runs would share one."""
    stable = {
        **{"optim.name": "adam", "optim.betas": [0.9, 0.999], "optim.eps": 1e-8, "optim.weight_decay": 0.0},
        **{"optim.clip": 0.0, "optim.warmup_ratio": 0.1, "optim.warmup_start_ratio": 0.0, "optim.min_lr_ratio": 0.1},
        **{"optim.schedule": "cosine", "optim.weighting": "tokens", "optim.decay_embeddings": True},
        **{"data.layout": "packed", "data.val_every": 50, "data.val_tokens": 10_000_000, "images.min_crop": 0.08},
        **{"eval.paper_batch": 64, "eval.paper_ranks": 1, "seed": 1},
    }
    found = flatten(identity(Config()))
    assert {name: found[name] for name in stable} == stable


def test_a_default_of_the_base_strategy_is_the_same_run_if_it_is_given():
    words = ["norm=gpas", "norm.base=lns"]
    assert compose([*words, "norm.position=after_ln"]).id == compose(words).id
    assert compose([*words, "norm.position=only_ffn"]).id != compose(words).id


def test_layers_beyond_the_bound_are_refused_before_they_are_built(monkeypatch):
    depths = []
    monkeypatch.setattr("cod_lightning.nn.strategies.build_all", lambda norm, depth: depths.append(depth) or [])
    with pytest.raises(UserError, match=r"model\.num_hidden_layers=10001 must be at most 10000"):
        compose(["model.num_hidden_layers=10001"])
    assert depths == [1]


def test_a_run_of_images_depends_on_no_setting_of_text():
    config = compose(["task=vision", "model=vit_tiny"])
    assert replace(config, data=replace(config.data, seq_len=64)).id == config.id
    assert replace(config, data=replace(config.data, batch_size=32)).id != config.id


def test_the_ranks_are_those_of_all_nodes():
    assert TrainerConfig(devices=4, num_nodes=2).world_size == 8


def test_the_model_determines_the_vocabulary_and_the_longest_sequence_if_it_can():
    words = ["model.vocab_size=5000", "model.max_position_embeddings=256"]
    configs = compose(words), compose(["data.vocab_size=300"]), compose(["data.tokenizer=t5-base"])
    assert [config.vocab_size for config in configs] == [5000, 300, None]
    assert [config.max_length for config in configs] == [256, configs[1].data.seq_len, configs[1].data.seq_len]


@pytest.mark.parametrize("source", ["runs/a", "runs/a/checkpoints/last.ckpt"])
def test_a_run_that_starts_from_another_has_its_tokenizer(source):
    assert init_from_run(compose(), Path(source)).data.tokenizer == "runs/a/tokenizer"
    assert init_from_run(compose(["data.tokenizer=t5-base"]), Path(source)).data.tokenizer == "t5-base"


def test_a_saved_configuration_loads_unchanged(tmp_path):
    config = compose([f"output={tmp_path}", "norm=gpas", "experiments=table1_1b"])
    folder = create_run_folder(config)
    assert load_config(folder) == config
    assert OmegaConf.to_container(OmegaConf.create(to_yaml(config))) == asdict(config)
    amended = load_config(folder, ["data=files", "data.files=[a,b]", "trainer.threads=3"])
    assert (amended.data.source, amended.data.files, amended.trainer.threads) == ("files", ["a", "b"], 3)


@pytest.mark.parametrize("name", choices("trainer"))
def test_a_trainer_means_the_same_for_a_saved_run_as_for_a_new_one(tmp_path, name):
    many = ["trainer=fsdp", "trainer.num_nodes=2", "trainer.hybrid=true", "trainer.offload=true"]
    folder = create_run_folder(compose([*many, "data.micro_batch_size=4", f"output={tmp_path}"]))
    words = [f"trainer={name}", "data.micro_batch_size=4"]
    assert load_config(folder, words).trainer == compose(words).trainer


def test_a_field_wins_over_a_group_that_follows_it(tmp_path):
    folder = create_run_folder(compose([f"output={tmp_path}"]))
    words = ["trainer.devices=4", "trainer=ddp", "data.micro_batch_size=4"]
    assert load_config(folder, words).trainer == compose(words).trainer


@pytest.mark.parametrize(
    ("of_run", "chosen", "dropped"),
    [
        ({"data.files": "a", "data.val_files": "v"}, {"data.files": "b"}, {"val_files"}),
        ({"data.files": "a", "data.folder": "set"}, {"data.files": "b"}, {"folder"}),
        ({"data.files": "a", "data.sha256": "0" * 64}, {"data.files": "b"}, {"sha256"}),
        ({"data.files": "a", "data.encoding": "latin-1"}, {"data.files": "b"}, {"encoding"}),
        ({"data.files": "a", "data.text_field": "content"}, {"data": "docs"}, {"text_field"}),
        ({"data.files": "a", "data.val_files": "v"}, {"data": "docs"}, {"files", "val_files"}),
        ({"data.files": "a", "data.val_files": "v"}, {"data.folder": "set"}, {"val_files"}),
        ({"data.files": "a", "data.folder": "set"}, {"data.val_files": "v"}, {"folder"}),
    ],
)
def test_another_text_replaces_all_that_names_the_text_of_a_run(of_run, chosen, dropped, tmp_path):
    """An earlier version saved runs with files beside a prepared set."""
    config = compose([f"output={tmp_path}", "data=files", "data.files=a"])
    config = replace(config, data=replace(config.data, **{key[5:]: value for key, value in of_run.items()}))
    folder = create_run_folder(config)
    data = load_config(folder, [f"{key}={value}" for key, value in chosen.items()]).data
    assert all(getattr(data, name) == getattr(DataConfig, name) for name in dropped)
    assert getattr(data, "source" if "data" in chosen else next(iter(chosen))[5:]) == next(iter(chosen.values()))


@pytest.mark.parametrize("source", ["small/a", "small/a/checkpoints/last.ckpt"])
def test_the_id_of_a_run_that_starts_from_another_does_not_depend_on_the_folder_of_runs(source, tmp_path):
    def run_id(output, source=source):
        return init_from_run(compose([f"output={output}"]), Path(output, source)).id

    assert run_id("runs") == run_id(tmp_path) == run_id(".")
    assert run_id("runs") != run_id("runs", "small/b")
    assert run_id("runs") != init_from_run(compose(), Path("elsewhere", source)).id


def test_the_initialisation_of_the_source_does_not_matter(tmp_path):
    folder = create_run_folder(compose([f"output={tmp_path}", "model.init=fan_in", "model.init_cutoff=3"]))
    check_init_from(compose([f"init_from={folder}"]))


def test_a_folder_of_another_configuration_is_not_overwritten(tmp_path):
    folder = create_run_folder(compose([f"output={tmp_path}", "name=mine"]))
    before = (folder / "config.yaml").read_text()
    assert create_run_folder(compose([f"output={tmp_path}", "name=mine", "trainer.threads=1"])) == folder
    create_run_folder(compose([f"output={tmp_path}", "name=mine"]))
    with pytest.raises(UserError, match=r"seed=1 there, 2 here.*choose another name="):
        create_run_folder(compose([f"output={tmp_path}", "name=mine", "seed=2"]))
    assert (folder / "config.yaml").read_text() == before


def test_restarting_renames_the_earlier_run_folder(tmp_path):
    words = [f"output={tmp_path}", "name=mine"]
    (create_run_folder(compose(words)) / "mark").touch()
    assert (create_run_folder(compose(words)) / "mark").exists()
    assert not (create_run_folder(compose([*words, "resume=false"])) / "mark").exists()
    assert (tmp_path / "mine.previous-1" / "mark").exists()


def test_runtime_fields_are_not_part_of_the_identity():
    fields = identity(compose())
    assert {"experiment", "output", "name", "resume", "logger", "paper", "scale", "row"}.isdisjoint(fields)
    assert {"devices", "threads", "checkpoint_every"}.isdisjoint(fields["trainer"])
    assert {"root", "micro_batch_size", "workers"}.isdisjoint(fields["data"])
    assert fields["norm"] == {"name": "lns", "position": "after_ln"}


@pytest.mark.parametrize(
    ("word", "loggers"),
    [
        ("logger=none", []),
        ("logger=csv", ["csv"]),
        ("logger=[csv,wandb]", ["csv", "wandb"]),
        ("seed=1", ["tensorboard"]),
    ],
)
def test_a_run_has_one_logger_or_several(word, loggers, tmp_path):
    config = compose([word, f"output={tmp_path}"])
    assert config.loggers == load_config(create_run_folder(config)).loggers == loggers


def test_sweeps_expand_in_the_order_of_hydra():
    assert list(sweep(["norm=pre_ln,lns", "seed=1,2", "trainer.max_steps=3"])) == [
        ["norm=pre_ln", "seed=1", "trainer.max_steps=3"],
        ["norm=pre_ln", "seed=2", "trainer.max_steps=3"],
        ["norm=lns", "seed=1", "trainer.max_steps=3"],
        ["norm=lns", "seed=2", "trainer.max_steps=3"],
    ]
    assert list(sweep(["seed=range(1,4)"])) == [["seed=1"], ["seed=2"], ["seed=3"]]


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        (
            ["optim.weight_decay=0,0.1", "optim.decay_embeddings=false"],
            [["optim.weight_decay=0"], ["optim.weight_decay=0.1", "optim.decay_embeddings=false"]],
        ),
        (
            ["model.init=normal,fan_in", "model.init_std=0.1,0.2"],
            [
                ["model.init=normal", "model.init_std=0.1"],
                ["model.init=normal", "model.init_std=0.2"],
                ["model.init=fan_in"],
            ],
        ),
        (
            ["experiments=table1_130m,table3_olmo_1b", "optim.warmup_ratio=0.05"],
            [["experiments=table1_130m", "optim.warmup_ratio=0.05"], ["experiments=table3_olmo_1b"]],
        ),
        (
            ["task=language,vision", "data.seq_len=64", "+images.min_crop=1"],
            [["task=language", "data.seq_len=64"], ["task=vision", "+images.min_crop=1"]],
        ),
        (["seed=1,2", "images.size=16"], [["seed=1", "images.size=16"], ["seed=2", "images.size=16"]]),
    ],
)
def test_a_run_of_a_sweep_leaves_out_what_has_an_effect_in_others_only(words, runs):
    """A word without effect in every run stays, and is an error."""
    assert list(sweep(words)) == runs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=interval(1,3)"], "a sweep takes a,b,c"),
        (["seed=range(1,1)"], r"seed=range\(1,1\) has no values"),
        (["seed=range(3,1)"], "has no values"),
        (["seed=range(1,9,0)"], r"seed=range\(1,9,0\): .* a sweep takes a,b,c"),
        (["seed=range(1,1000000000)"], "at most 10,000 runs"),
        (["seed=range(0,200)", "optim.lr=range(1,200)"], "at most 10,000 runs, and this has at least 39,800"),
    ],
)
def test_a_sweep_without_runs_or_with_too_many_is_an_error(words, message):
    with pytest.raises(UserError, match=message):
        sweep(words)


ABSURD = [
    *("trainer.threads", "trainer.devices", "trainer.num_nodes", "trainer.probe_rows", "trainer.timeout"),
    *("data.vocab_size", "data.seq_len", "data.batch_size", "data.micro_batch_size", "data.workers"),
    *("data.loader_workers", "model.hidden_size", "model.intermediate_size", "model.num_hidden_layers"),
    *("model.vocab_size", "eval.paper_ranks", "images.size", "images.patch_size", "images.classes"),
]


@pytest.mark.parametrize("name", ABSURD)
def test_a_size_that_no_machine_has_is_out_of_bounds(name):
    with pytest.raises(UserError, match=rf"{name}=1(0{{15}}|e\+15)(\.0)? must be at most"):
        compose([f"{name}=1000000000000000"])


@pytest.mark.parametrize(("name", "digits"), [("optim.lr", 5000), ("optim.lr", 400), ("seed", 5000), ("seed", 400)])
def test_a_number_of_too_many_digits_names_its_field(name, digits):
    with pytest.raises(UserError, match=rf"^{name}\b"):
        compose([f"{name}={'1' * digits}"])


@pytest.mark.parametrize(
    "word", ["name=2024_05_12", "data.root=1e3", "data.text_field=true", "name=1.10", "init_from=7"]
)
def test_the_text_of_a_field_is_not_read_as_a_number(word):
    (override,) = parse([word])
    assert f"{override.key_or_group}={override.value()}" == word


@pytest.mark.parametrize(("text", "number"), [("1e-3", 0.001), ("1.5e3", 1500.0), (".5E2", 50.0)])
def test_a_file_may_write_a_number_with_an_exponent(text, number, tmp_path, monkeypatch):
    (tmp_path / "faint.yaml").write_text(f"init: {text}\nname: '{text}'\n")
    monkeypatch.setattr(groups, "config_folder", lambda: tmp_path)
    assert groups.read_yaml("faint") == {"init": number, "name": text}


def test_the_last_of_two_scales_counts():
    assert compose(["scale=toy", "scale=mini"]) == compose(["scale=mini"])


def test_a_custom_strategy_accepts_its_options(tmp_path, monkeypatch):
    (tmp_path / "norms_of_mine.py").write_text(
        "from cod_lightning.nn.strategies import block\n"
        "def steeper(layer, depth, power=1.0):\n    return block(gain=layer**-power)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = compose(["norm=norms_of_mine:steeper", "norm.power=0.5"])
    assert config.norm == {"name": "norms_of_mine:steeper", "power": 0.5}
    with pytest.raises(UserError, match=r"norm\.powre is not an option.*did you mean 'power'"):
        compose(["norm=norms_of_mine:steeper", "norm.powre=0.5"])
    assert list(sweep(["norm=lns,norms_of_mine:steeper"])) == [["norm=lns"], ["norm=norms_of_mine:steeper"]]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiments=table1_350"], ["experiments='table1_350'", "did you mean 'table1_350m'"]),
        (["norm=mixln"], ["norm='mixln'", "did you mean 'mix_ln'"]),
        (["model=llama_2b"], ["model='llama_2b'", "llama_1b"]),
        (["data=wiki"], ["data='wiki'", "known: c4, commonsense170k, docs"]),
        (["protocol=papr"], ["protocol='papr'", "did you mean 'paper'"]),
        (["scale=smal"], ["scale='smal'", "did you mean 'small'"]),
        (["optim.lrr=1"], ["optim.lrr is not a field", "did you mean 'lr'"]),
        (["optimm.lr=1"], ["optimm is not a field", "did you mean 'optim'"]),
        (["sed=1"], ["sed is not a field", "did you mean 'seed'"]),
        (["seed.x=1"], ["seed.x=1", "Integer"]),
        (["trainer.max_steps=many"], ["trainer.max_steps=many", "Integer"]),
        (["data.seq_len=null"], ["data.seq_len: it needs a value, not null"]),
        (["resume=perhaps"], ["resume=perhaps", "bool"]),
        (["optim.betas=0.9"], ["optim.betas: it needs a list, such as [0.9,0.95]"]),
        (["optim.betas=[0.9]"], ["optim.betas=[0.9]", "two numbers"]),
        (["steps"], ["expected key=value"]),
        (["norm=pre_ln,lns"], ["norm=pre_ln,lns", "fit -m"]),
        (["norm.position=after"], ["norm.position='after'", "after_ln"]),
        (["norm.fraction=0.5"], ["norm.fraction is not an option of 'lns'", "position"]),
        (["norm=nowhere.norms:f"], ["nowhere", "package.module:function"]),
        (["model.num_attention_heads=5"], ["model.num_attention_heads=5", "model.hidden_size=96"]),
        (["model.norm=batch"], ["model.norm='batch'", "known: layer, rms"]),
        (["model.vocab_size=100"], ["model.vocab_size=100 is smaller", "data.vocab_size=4096"]),
        (
            ["model.max_position_embeddings=64", "data.seq_len=65"],
            ["data.seq_len=65 is longer than", "model.max_position_embeddings=64"],
        ),
        (["norm=group_ln", "norm.groups=7"], ["norm.groups=7", "model.hidden_size=96"]),
        (["model.hidden_size=15"], ["model.hidden_size=15", "heads of width 5", "rotary embeddings"]),
        (["task=vision", "model.rope_theta=5"], ["model.rope_theta=5.0 does not support task=vision"]),
        (["task=vision", "model.tie_word_embeddings=true"], ["set model.tie_word_embeddings=false"]),
        (["norm=lns_as_rates", "optim.weight_decay=0.1"], ["optim.weight_decay=0.1", "set optim.name=adamw"]),
        (["norm=lns_as_norm_weights", "model.norm_affine=false"], ["norm=lns_as_norm_weights needs norms"]),
        (["optim.warmup_steps=250"], ["optim.warmup_steps=250", "trainer.max_steps=250"]),
        (["optim.warmup_ratio=1"], ["optim.warmup_ratio=1", "trainer.max_steps=250"]),
        (["optim.lr=0"], ["optim.lr=0", "greater than 0"]),
        (["optim.name=sgd"], ["optim.name='sgd'", "known: adam, adamw"]),
        (["data.batch_size=24"], ["data.batch_size=24", "data.micro_batch_size=16", "1 rank(s)"]),
        (["trainer=ddp"], ["data.batch_size=16", "x 2 rank(s) = 32"]),
        (["trainer.devices=2", "data.micro_batch_size=8"], ["trainer.strategy='auto'", "trainer=ddp"]),
        (["trainer.hybrid=true"], ["trainer.hybrid=true requires trainer.strategy=fsdp"]),
        (["trainer=fsdp", "optim=lisa", "data.micro_batch_size=8"], ["optim.lisa_layers does not support FSDP"]),
        (["trainer.max_steps=0"], ["trainer.max_steps=0", "at least 1"]),
        (["trainer.measures.jacobain=9"], ["trainer.measures='jacobain'", "did you mean 'jacobian'"]),
        (["trainer.measures={angular: -1}"], ["trainer.measures.angular=-1", "at least 0"]),
        (["trainer.measures.angular=often"], ["trainer.measures.angular=often", "Integer"]),
        (["trainer.measures=9"], ["trainer.measures=9", "Dict"]),
        (["trainer.precision=fp8"], ["trainer.precision='fp8'", "bf16-mixed"]),
        (["eval.paper_batch=0"], ["eval.paper_batch=0", "at least 1"]),
        (["logger=[csv,tensorbord]"], ["logger='tensorbord'", "did you mean 'tensorboard'"]),
        (["name=../elsewhere"], ["name='../elsewhere'", "below output"]),
        (["data.layout=ragged"], ["data.layout='ragged'", "packed"]),
        (["data.seq_len=1"], ["data.seq_len=1 must be at least 2"]),
        (["data=files"], ["data.files is empty: data.source=files needs a glob"]),
        (["~norm"], ["~norm", "cannot be deleted"]),
        (["+foo=1"], ["foo is not a field"]),
        (["++optim.lrr=1"], ["optim.lrr is not a field", "did you mean 'lr'"]),
        (["norm=custom"], ["norm='custom' does not exist"]),
        (["norm.positon=after_ln"], ["norm.positon", "did you mean 'position'"]),
        (["norm=gpas", "norm.base=3"], ["norm.base=3 is not the name of a strategy"]),
        (["norm=skip_init", "norm.init=x"], ["attention.branch_scale='x', expected a finite number"]),
        (["norm=scaled_init", "norm.base=deep_norm"], ["norm='scaled_init'", "norm.base", "xavier"]),
        (["norm=skip_init", "norm.base=layer_scale"], ["norm='skip_init'", "branch_scale"]),
        (["norm=lns_learnable", "model.norm_affine=false"], ["norm=lns_learnable", "model.norm_affine=true"]),
        (["optim.warmup_ratio=nan"], ["optim.warmup_ratio=nan", "finite"]),
        (["optim.lr=inf"], ["optim.lr=inf", "finite"]),
        (["experiment=../x"], ["experiment='../x'", "below output"]),
        (["name=."], ["name='.'", "below output"]),
    ],
)  # fmt: skip
def test_bad_overrides_are_refused_by_field(overrides, words):
    with pytest.raises(UserError) as error:
        compose(overrides)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("word", ["model.hidden_size=15", "protocol=paper"])
def test_a_vision_run_has_no_errors_about_tokens(word):
    assert compose(["task=vision", "model=vit_tiny", "model.num_attention_heads=1", word]).task == "vision"


def test_all_problems_are_reported_together():
    overrides = ["norm=mixln", "optim.lrr=1", "trainer.max_steps=x", "data.batch_size=24", "eval.every=0"]
    with pytest.raises(UserError) as error:
        compose(overrides)
    assert len(str(error.value).splitlines()) == len(overrides)


def test_options_of_a_base_strategy_are_accepted():
    config = compose(["norm=gpas", "norm.base=mix_ln", "norm.fraction=0.5"])
    assert config.norm == {"name": "gpas", "base": "mix_ln", "fraction": 0.5}
    assert compose(["norm='cod_lightning.nn.strategies:pre_ln'"]).norm == {"name": "cod_lightning.nn.strategies:pre_ln"}


@pytest.mark.parametrize("content", ["", "a: [b", "norm: {}", "optim: {lr: x}", "no_such_field: 1"])
def test_a_damaged_saved_configuration_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"(config\.yaml: not a saved configuration|norm\.name is missing)"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["there", "{tmp_path}/there"])
def test_a_run_has_its_own_copy_of_the_tokenizer_of_a_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    words = [f"output={tmp_path}", "name=run", f"data.tokenizer={name.format(tmp_path=tmp_path)}"]
    folder = create_run_folder(compose(words))
    assert load_config(folder).data.tokenizer == str(folder / "tokenizer")
    assert load_config(folder, ["data.tokenizer=gpt2"]).data.tokenizer == "gpt2"
    assert load_config(folder, ["data.val_every=3", "data.tokenizer=gpt2"]).data.tokenizer == "gpt2"


@pytest.mark.parametrize(
    ("name", "own"), [("bpe", False), ("gpt2", False), ("owner/name", False), ("../gone/tok", True)]
)
def test_names_of_the_hub_and_bpe_are_no_folders(tmp_path, monkeypatch, name, own):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bpe").mkdir()
    folder = create_run_folder(compose([f"output={tmp_path}", "name=run", f"data.tokenizer={name}"]))
    assert load_config(folder).data.tokenizer == (str(folder / "tokenizer") if own else name)


@pytest.mark.parametrize("other", [["data=files", "data.files=x"], ["data.val_every=3"], ["data.max_documents=100"]])
def test_other_text_is_read_with_the_tokenizer_of_the_run(tmp_path, other):
    folder = create_run_folder(
        compose([f"output={tmp_path}", "name=run", "model.vocab_size=300", "data.vocab_size=300"])
    )
    assert load_config(folder, other).data.tokenizer == str(folder / "tokenizer")


def test_a_run_whose_source_was_moved_has_its_own_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = create_run_folder(compose(["output=runs", "name=source"]))
    (source / "tokenizer").mkdir()
    words = ["output=runs", "name=run", f"init_from={source}", f"data.tokenizer={source}/tokenizer"]
    folder = create_run_folder(compose(words))
    source.rename("elsewhere")
    assert load_config(folder).data.tokenizer == str(folder.absolute() / "tokenizer")
    other = create_run_folder(compose(["output=runs", "name=other", "init_from=w.ckpt", "data.tokenizer=gpt2"]))
    assert load_config(other).data.tokenizer == "gpt2"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("protocol=paper", "accepts data=, trainer="),
        ("norm=lns", "accepts data=, trainer="),
        ("seed=1,2", "needs fit -m"),
        ("~data", "cannot be deleted"),
        ("data=wiki", "does not exist"),
        ("optim.lrr=1", "is not a field"),
    ],
)
def test_a_trained_run_refuses_other_overrides(tmp_path, word, message):
    folder = create_run_folder(compose([f"output={tmp_path}"]))
    with pytest.raises(UserError, match=message):
        load_config(folder, [word])


def test_an_output_that_cannot_be_written_is_an_os_error_with_its_name():
    with pytest.raises(OSError, match="/dev/null"):
        create_run_folder(compose(["output=/dev/null/x"]))
