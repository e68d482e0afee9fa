"""When checkpoints are written, and what is read from them, without a training."""

import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cod_lightning.config.compose import compose
from cod_lightning.config.schema import resumable_settings
from cod_lightning.errors import UserError
from cod_lightning.nn.strategies import build_all
from cod_lightning.nn.vit import VisionTransformer
from cod_lightning.train import run
from cod_lightning.train.callbacks import Checkpoints
from cod_lightning.train.load import load_vit
from cod_lightning.train.run import resumed_data_state


@pytest.fixture
def saved(monkeypatch):
    """The steps and names of the checkpoints that are written."""
    pairs = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, trainer, name: pairs.append((trainer.global_step, name)))
    return pairs


def test_checkpoints_precede_validations_and_end_the_run(saved, tmp_path):
    saver, module = Checkpoints(tmp_path, every=4, keep=1, val_every=3), SimpleNamespace(stop_requested=False)
    for step in range(1, 11):
        trainer: Any = SimpleNamespace(global_step=step, max_steps=10, is_global_zero=False)
        saver.on_train_batch_end(trainer, module, None, None, step)
    assert [step for step, _ in saved] == [3, 4, 6, 8, 9, 10]


def test_a_resumed_run_remembers_its_best_loss(saved, tmp_path):
    def validate(saver, step, loss):
        saver.on_validation_end(SimpleNamespace(global_step=step, callback_metrics={"val_loss": loss}), None)

    first, resumed = (Checkpoints(tmp_path, every=1, keep=1, val_every=1) for _ in range(2))
    validate(first, 1, 2.0)
    resumed.load_state_dict(first.state_dict())
    for step, loss in ((2, 3.0), (3, 1.5), (4, 1.7)):
        validate(resumed, step, loss)
    assert saved == [(1, "best.ckpt"), (3, "best.ckpt")]


def test_only_partial_files_of_a_run_are_removed(tmp_path):
    names = {f".{name}.12345678.partial" for name in ("step-00000003.ckpt", "best.ckpt", "whole-00000003.ckpt")}
    for name in names:
        (tmp_path / name).touch()
    Checkpoints(tmp_path, 1, 1, 1).setup(SimpleNamespace(is_global_zero=True), None, "validate")
    assert {path.name for path in tmp_path.iterdir()} == {".whole-00000003.ckpt.12345678.partial"}  # of `consolidate`


def test_a_setting_that_an_older_checkpoint_lacks_had_its_default(monkeypatch):
    config = compose(["data.micro_batch_size=4", "optim.weight_decay=0.1", "optim.decay_embeddings=false"])
    older = {name: value for name, value in resumable_settings(config).items() if name != "optim.decay_embeddings"}
    monkeypatch.setattr(run, "read_resumable", lambda path: {"settings": older})
    with pytest.raises(UserError, match=r"optim\.decay_embeddings=True there, False here"):
        resumed_data_state(config, Path("step-00000002.ckpt"))
    same = replace(config, optim=replace(config.optim, decay_embeddings=True))
    assert resumed_data_state(same, Path("step-00000002.ckpt")) == {"fingerprint": None}


@pytest.mark.parametrize("changed", ["gain=layer**-1", "branch_schedule=Schedule(lambda step: step / 5, 4)"])
def test_a_run_is_not_resumed_under_another_function_of_the_same_name(changed, monkeypatch):
    def config_of(coefficients):
        module = types.ModuleType("norms_under_test")
        text = "from cod_lightning.nn.strategies import *\nfrom cod_lightning.nn.spec import Schedule\n"
        exec(f"{text}def f(layer, depth): return BlockSpec(*[SublayerSpec({coefficients})] * 2)", vars(module))
        monkeypatch.setitem(sys.modules, "norms_under_test", module)
        return compose(["norm=norms_under_test:f"])

    checkpoint = Path("step-00000002.ckpt")
    settings = resumable_settings(config_of("gain=layer**-0.5"))
    monkeypatch.setattr(run, "read_resumable", lambda path: {"settings": settings})
    resumed_data_state(config_of("gain=layer**-0.5"), checkpoint)
    other = config_of(changed)
    with pytest.raises(UserError, match=r"of a run with other settings \(norm\.coefficients="):
        resumed_data_state(other, checkpoint)
    settings.pop("norm.coefficients")  # as in checkpoints of earlier versions
    resumed_data_state(other, checkpoint)


def test_a_loaded_vision_transformer_has_the_step_of_its_checkpoint(tmp_path):
    config = compose(["task=vision", "model=vit_tiny", "norm=pro_res", "norm.warmup=3"])
    shape = (config.images.size, config.images.patch_size, 5)
    vit = VisionTransformer(config.model, build_all(config.norm, config.model.num_hidden_layers), *shape)
    state = {f"vit.{name}": torch.zeros_like(tensor) for name, tensor in vit.state_dict().items()}
    torch.save({"state_dict": state, "tokens": 0, "global_step": 2}, tmp_path / "step-00000002.ckpt")
    loaded = load_vit(config, tmp_path / "step-00000002.ckpt")
    assert (loaded.step, loaded.blocks[0].ffn_residual.factor.item()) == (2, pytest.approx(2 / 3))
