"""The record and the progress lines of a run, with a clock that the tests set."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.training import training_jacobian
from cod_lightning.train.callbacks import ProgressLines, Recorder
from cod_lightning.train.probes import ProbeCallback
from tiny_models import tiny_decoder


@pytest.fixture
def clock(monkeypatch):
    """A list whose last entry is the time."""
    times = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: times[-1])
    return times


def started(clock, at, state=None):
    """A recorder of a run that starts, or resumes from a state, at a time."""
    recorder = Recorder(3, "strict")
    if state is not None:
        recorder.load_state_dict(state)
    clock.append(at)
    recorder.setup(SimpleNamespace(), SimpleNamespace(), "fit")
    return recorder


def test_a_resumed_run_adds_to_its_seconds_and_tokens(clock):
    first = started(clock, 10.0)
    first.tokens, first.train_seconds, first.measure_seconds = 64.0, 4.0, 2.0
    clock.append(17.0)
    second = started(clock, 100.0, first.state_dict())
    clock.append(103.0)
    seconds = {"train_seconds": 4.0, "measure_seconds": 2.0, "wall_seconds": 7.0 + 3.0}
    assert second.state_dict() == {"history": {}, "tokens": 64.0, **seconds}


def test_the_record_has_the_last_loss_and_the_speed_of_the_training_steps(clock):
    recorder = started(clock, 10.0)
    recorder.history = {
        "train": {"step": [1, 2], "loss": [3.0, 2.0], "tokens": [32.0, 64.0]},
        "val": {"step": [1, 2], "val_loss": [3.5, 2.5], "val_tokens": [9.0, 9.0]},
    }
    recorder.train_seconds, recorder.measure_seconds = 4.0, 2.0
    clock.append(20.0)
    expected = {"val_loss": 2.5, "val_tokens": 9, "train_loss": 2.0, "tokens": 64, "tokens_per_second": 16.0}
    assert recorder.final() == expected | {"measure_seconds": 2.0, "wall_seconds": 10.0}


def test_the_first_and_the_last_step_are_recorded_beside_every_third(clock):
    recorder = started(clock, 0.0)
    module: Any = SimpleNamespace(log_dict=lambda *_, **__: None)
    for step in range(1, 8):
        trainer: Any = SimpleNamespace(global_step=step, max_steps=7, loggers=[])
        recorder.on_train_batch_start(trainer, module, None, step)
        clock.append(clock[-1] + 2)
        recorder.on_train_batch_end(trainer, module, {"loss": 2.0, "lr": 0.1, "tokens": 8.0 * step}, None, step)
    assert recorder.history["train"]["step"] == [1, 3, 6, 7]
    assert recorder.history["train"]["tokens_per_second"] == [4.0] * 4


def test_the_seconds_of_all_measurements_add_up(clock):
    class Slow(ProbeCallback):
        def measure(self, *_):
            clock.append(clock[-1] + 5)

    recorder = started(clock, 0.0)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device="cpu"))
    for _ in range(2):
        Slow(recorder, None, 1).measure_copy(trainer, SimpleNamespace(network=tiny_decoder()))
    assert recorder.measure_seconds == 10.0


def test_a_progress_line_has_the_seconds_of_the_remaining_steps(capsys):
    recorder = Recorder(1, "strict")
    recorder.history["train"] = {"step": [5], "loss": [2.0], "lr": [1e-3], "tokens": [500.0], "tokens_per_second": [10]}
    trainer: Any = SimpleNamespace(global_step=5, max_steps=20, is_global_zero=True)
    ProgressLines(recorder).on_train_batch_end(trainer, None, None, None, 5)
    assert capsys.readouterr().err == "step      5/20  loss 2.0000  lr 1.00e-03  10 tokens/s  150 s left\n"


def test_the_jacobian_in_training_reads_one_token_of_four_sequences():
    model = ModelAdapter(tiny_decoder(depth=10).eval(), "model")
    tokens = torch.randint(37, (8, 5), generator=torch.Generator().manual_seed(0))
    result = training_jacobian(model, [tokens[:3], tokens[3:]], None, None)
    assert (len(result.layers), result.tokens) == (8, 4)
    assert training_jacobian(model, [tokens[:4]], None, None).rows() == result.rows()
