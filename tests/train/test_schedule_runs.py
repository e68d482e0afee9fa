"""Runs whose coefficients depend on the step."""

import pytest
import torch
from run_files import copy_checkpoints, history, last, weights

from cod_lightning.cli import main
from cod_lightning.config.saved import load_config
from cod_lightning.nn.decoder import Decoder
from cod_lightning.train.load import load_run
from cod_lightning.train.run import validate_checkpoint

RUN = ("norm=pro_res", "norm.warmup=3")
"""The three layers reach 1 at steps 3, 6 and 9; the run has six steps."""


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("schedules")


@pytest.fixture(scope="module")
def whole(train_in, output):
    return train_in(output, *RUN, "name=whole", "trainer.keep_last=9")


@pytest.fixture(scope="module")
def resumed(train_in, output, whole):
    copy_checkpoints(whole[1], output / "resumed", until=2)
    return train_in(output, *RUN, "name=resumed")


def test_a_run_resumed_in_the_middle_of_a_schedule_is_bit_identical(whole, resumed):
    assert history(resumed[0]) == history(whole[0])
    expected = weights(last(whole[1]))
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(last(resumed[1])).items())


def factors(decoder):
    return [block.ffn_residual.factor.item() for block in decoder.blocks]


def test_a_loaded_run_has_the_factors_of_its_last_step(whole):
    decoder, _ = load_run(whole[1])
    assert (decoder.step, factors(decoder)) == (6, [1.0, 1.0, pytest.approx(2 / 3)])


def test_evaluate_uses_the_factors_of_the_checkpoint(whole):
    record, folder = whole
    assert validate_checkpoint(load_config(folder), last(folder))["val_loss"] == record["val_loss"]


def test_all_micro_batches_of_a_step_have_its_factors(train, monkeypatch):
    forward, training, validation = Decoder.forward, [], []

    def record(self, *args, **kwargs):
        (training if torch.is_grad_enabled() else validation).append(factors(self)[-1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Decoder, "forward", record)
    train(*RUN, "data.micro_batch_size=4", "trainer.stats_every=0", "trainer.max_steps=4", "eval.every=2")
    assert training == [step / 9 for step in range(4) for _ in range(2)]
    assert sorted(set(validation)) == [2 / 9, 4 / 9]


def test_export_says_when_the_schedule_ends(whole, tmp_path, capsys):
    assert main(["export", str(whole[1]), "--output", str(tmp_path / "hf")]) == 2
    assert "error: branch_schedule ends at step 9, and the model is at step 6" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
