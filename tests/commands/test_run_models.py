"""The checkpoint that a command reads, and the run that it writes, without a training."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cod_lightning.cli import main
from cod_lightning.commands import convert, evaluate, fit, grow, measure_runner
from cod_lightning.commands.processes import CommandPool
from cod_lightning.config.compose import compose
from cod_lightning.errors import UserError
from cod_lightning.train.load import checkpoint_of
from tiny_models import tiny_decoder


class Loaded(Exception):
    """Raised instead of loading a checkpoint."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder with two checkpoints that cannot be loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/tokenizer").mkdir(parents=True)
    for name in ("run/config.yaml", "run/checkpoints/step-00000001.ckpt", "run/checkpoints/best.ckpt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def read(config, checkpoint):
        raise Loaded(checkpoint.name)

    monkeypatch.setattr("cod_lightning.config.saved.load_config", lambda *_, **__: compose(["trainer.accelerator=cpu"]))
    monkeypatch.setattr("cod_lightning.train.load.load_tokenizer", lambda *_: None)
    monkeypatch.setattr("cod_lightning.train.load.read_run_weights", read)
    monkeypatch.setattr("cod_lightning.evaluate.lm_eval.task_manager", lambda *_: None)
    return "run"


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "run", "the norm"],
        ["export", "run"],
        ["convert", "run", "norm=lns", "--output=new"],
        ["verify", "run"],
        ["measure", "variance", "run"],
        ["evaluate", "run", "tasks=piqa"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize(("options", "name"), [([], "step-00000001.ckpt"), (["--checkpoint=best"], "best.ckpt")])
def test_a_command_reads_the_checkpoint_that_is_asked_for(run, words, options, name):
    with pytest.raises(Loaded, match=name):
        main([*words, *options])


def test_a_checkpoint_that_is_neither_last_nor_best_is_an_error(run):
    with pytest.raises(UserError, match="checkpoint='step-00000001'"):
        checkpoint_of(Path(run), "step-00000001")


@pytest.mark.parametrize(("longest", "warned"), [(5, True), (6, False)])
def test_a_generated_text_that_is_longer_than_the_model_supports_is_named(monkeypatch, capsys, longest, warned):
    config = compose(["trainer.accelerator=cpu", f"data.seq_len={longest}"])
    tokenizer = SimpleNamespace(encode=lambda texts: [[1, 2, 3, 0]], eos_id=None, backend=SimpleNamespace(decode=str))
    monkeypatch.setattr("cod_lightning.config.saved.load_config", lambda *_, **__: config)
    monkeypatch.setattr("cod_lightning.train.load.checkpoint_of", lambda *_: None)
    monkeypatch.setattr("cod_lightning.train.load.load_decoder", lambda *_: (tiny_decoder(), tokenizer))
    assert main(["generate", "run", "a", "--max-tokens", "3"]) == 0
    assert ("warning: the text has 6 tokens, and the model supports 5" in capsys.readouterr().err) == warned


def test_a_run_is_measured_on_its_held_out_sequences_without_padding(monkeypatch):
    module = SimpleNamespace(prepare_data=lambda: None, setup=lambda stage: None, val_count=3)
    module.tokenizer = SimpleNamespace(pad_id=7)
    module.probe_batch = lambda rows: torch.arange(4 * rows).reshape(rows, 4)
    monkeypatch.setattr(measure_runner, "TokenDataModule", lambda *_: module)
    monkeypatch.setattr(measure_runner, "load_decoder", lambda *_: (tiny_decoder(), SimpleNamespace(decode=None)))
    config = compose(["trainer.accelerator=cpu", "data.micro_batch_size=2"])
    opened = measure_runner.open_run(config, Path("run"), Path("step-00000001.ckpt"), rows=5)
    assert [len(batch) for batch in opened.batches] == [2, 1]
    assert torch.equal(torch.cat(list(opened.batches)), torch.arange(12).reshape(3, 4))
    assert (opened.pad_id, opened.tokens) == (7, 11)


@pytest.mark.parametrize(("limit", "saved"), [(None, True), (5, False)])
def test_only_scores_of_whole_tasks_are_saved(tmp_path, monkeypatch, limit, saved):
    for name, value in (("lm_eval.task_manager", None), ("lm_eval.score_tasks", {"piqa": {"acc": 0.5}})):
        monkeypatch.setattr(f"cod_lightning.evaluate.{name}", lambda *_, value=value, **__: value)
    monkeypatch.setattr("cod_lightning.train.load.checkpoint_of", lambda *_: None)
    monkeypatch.setattr("cod_lightning.train.load.load_decoder", lambda *_: (SimpleNamespace(step=3), None))
    config = compose(["trainer.accelerator=cpu"])
    evaluate.score_run(config, tmp_path, "last", "piqa", None, limit)
    assert (tmp_path / "tasks.json").exists() == saved


@pytest.fixture
def written(monkeypatch):
    """The configurations and models that are written as runs; the command reads a run that starts from another one."""
    runs, config, decoder = [], compose(["norm=pre_ln", "init_from=runs/a", "name=b"]), tiny_decoder("pre_ln", depth=3)
    config.model, config.row = decoder.config, "pre_ln"
    for module in (convert, grow):
        monkeypatch.setattr(module, "read_trained", lambda *_: (config, decoder, None))
    monkeypatch.setattr(
        "cod_lightning.train.load.write_run", lambda config, decoder, *_: runs.append((config, decoder))
    )
    return runs


def test_a_grown_run_has_its_depth_and_no_source(written, tmp_path):
    grow.run("runs/b", "last", False, tmp_path, ["blocks=6"])
    ((config, decoder),) = written
    assert (config.model.num_hidden_layers, len(decoder.blocks), config.norm["name"]) == (6, 6, "pre_ln")
    assert (config.init_from, config.name, config.row) == (None, None, None)


def test_a_converted_run_has_its_strategy_and_no_source(written, tmp_path):
    convert.run("runs/b", "last", False, tmp_path, ["norm=lns"])
    ((config, decoder),) = written
    assert (config.norm["name"], decoder.blocks[2].spec.ffn.gain) == ("lns", pytest.approx(3**-0.5))
    assert (config.init_from, config.name, config.row) == (None, None, None)


def test_a_failed_run_of_a_sweep_has_no_record_in_its_table(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(CommandPool, "run_command", lambda pool, words, label: 2 if "seed=2" in words else 0)
    monkeypatch.setattr("cod_lightning.train.record.read_record", lambda folder: {"an earlier": "record"})
    monkeypatch.setattr("cod_lightning.commands.sweeps.sweep_table", lambda runs: shown.extend(runs))
    monkeypatch.setattr("cod_lightning.commands.terminal.show", lambda table: None)
    assert fit.run_sweep(["seed=1,2,3", f"output={tmp_path}"], jobs=1) == 2
    assert [(label, record is None) for label, record in shown] == [
        ("seed=1", False),
        ("seed=2", True),
        ("seed=3", False),
    ]
