"""Callbacks that record, measure, report and interrupt a run."""

from __future__ import annotations

import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.progress import BarColumn

from cod_lightning import signals
from cod_lightning.config.schema import COUNTS, METRIC_FORMATS, is_shown, printed_metrics
from cod_lightning.errors import Stopped, UserError
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.training import TRAINING_MEASURES, plot_variance
from cod_lightning.nn.parallel import unwrapped_copy
from cod_lightning.rng import isolate_rng
from cod_lightning.train.loggers import layer_scalars, log_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = dict[str, dict[str, list[Any]]]
"""Series by kind: `train`, `val`, `layers`, and the names of measures.

A series has lists of equal length, one of them `step`. An entry of a measure is a list over the blocks in `layer`, or
over all blocks if the series has no `layer`."""

MAX_FIGURES = 8
"""The number of figures of a measure in the loggers, besides the one of step 0 (see `is_figure_step`)."""

STOPPING = b"\nfinishing the step to save a checkpoint; Ctrl-C again stops at once, without a checkpoint\n"
"""The answer to the first Ctrl-C."""

LOSSES = {"train/loss": "Loss/train", "val/val_loss": "Loss/val"}
"""Tags of the losses in the loggers: TensorBoard sorts upper case first, so it opens on them."""


class Recorder(Callback):
    """Records the metrics of a run by step and logs them; its state is saved in checkpoints.

    Args:
        log_every: steps between recorded training metrics.
        protocol: of the run; says which metrics are logged.
    """

    def __init__(self, log_every: int, protocol: str):
        self.log_every, self.protocol = log_every, protocol
        self.history: History = {}
        self.tokens = 0.0
        self.train_seconds = 0.0
        self.measure_seconds = 0.0
        self.wall_seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "tokens": self.tokens,
            "train_seconds": self.train_seconds,
            "measure_seconds": self.measure_seconds,
            "wall_seconds": self.wall_seconds + time.perf_counter() - self.started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
        self.tokens = state_dict["tokens"]
        self.train_seconds = state_dict["train_seconds"]
        self.measure_seconds = state_dict.get("measure_seconds", 0.0)
        self.wall_seconds = state_dict["wall_seconds"]

    def add(self, trainer: Trainer, kind: str, **values: Any) -> None:
        """Append one entry to the series `kind`, and log the numbers of it that are shown."""
        series = self.history.setdefault(kind, {})
        for name, value in {"step": trainer.global_step, **values}.items():
            series.setdefault(name, []).append(value)
        shown = {name: value for name, value in values.items() if is_shown(name, self.protocol)}
        tags = {f"{kind}/{name}": value for name, value in shown.items() if isinstance(value, int | float)}
        numbers = {LOSSES.get(tag, tag): value for tag, value in tags.items()}
        lists = {name: value for name, value in shown.items() if isinstance(value, list)}
        numbers |= layer_scalars(lists, "" if kind == "layers" else f"{kind}_")
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)

    @property
    def last_validation(self) -> int | None:
        """The step of the last recorded validation, None before the first."""
        return self.history["val"]["step"][-1] if "val" in self.history else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.started = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        outputs = {name: float(value) for name, value in outputs.items()}  # waits for the device
        seconds = time.perf_counter() - self.batch_started
        self.train_seconds += seconds
        rate = (outputs["tokens"] - self.tokens) / seconds
        self.tokens = outputs["tokens"]
        shown = {"loss": outputs["loss"], "tokens/s": rate}
        pl_module.log_dict(shown, prog_bar=True, logger=False, rank_zero_only=True)
        if trainer.global_step % self.log_every == 0 or trainer.global_step in (1, trainer.max_steps):
            self.add(trainer, "train", **outputs, tokens_per_second=rate)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        values = {name: float(metrics[name]) for name in (*METRIC_FORMATS, *COUNTS) if name in metrics}
        self.add(trainer, "val", **values)

    def final(self) -> dict[str, Any]:
        """The metrics of the last validation, and tokens, tokens per second and seconds of the run."""
        last = {name: values[-1] for name, values in self.history["val"].items() if name != "step"}
        tokens = int(self.history["train"]["tokens"][-1])
        return {
            **last,
            **{name: int(last[name]) for name in COUNTS if name in last},
            "train_loss": self.history["train"]["loss"][-1],
            "tokens": tokens,
            "tokens_per_second": tokens / self.train_seconds,
            "measure_seconds": self.measure_seconds,
            "wall_seconds": self.wall_seconds + time.perf_counter() - self.started,
        }


class StopOnSignal(Callback):
    """Stops cleanly on SIGINT and any of `STOP_SIGNALS`, on all ranks after the same step or validation batch.

    After a step, `Checkpoints` saves and stops. During a validation there already is a checkpoint of its step. A second
    SIGINT interrupts at once.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Replace Lightning's SIGTERM handler, which starts a collective at an arbitrary point."""

        def request_stop(number: int, frame: Any) -> None:
            if number == signal.SIGINT and pl_module.stop_signal == signal.SIGINT:
                raise KeyboardInterrupt
            pl_module.stop_signal = number
            if number == signal.SIGINT and trainer.is_global_zero:
                os.write(2, STOPPING)  # print fails in a handler that interrupts a print

        signals.install(request_stop, (*signals.STOP_SIGNALS, signal.SIGINT))

    on_train_start = on_validation_start

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *arguments: Any, **named: Any) -> None:
        if pl_module.sum_over_ranks(torch.tensor(int(pl_module.stop_signal is not None))).item():
            reason = f"interrupted in the validation after step {trainer.global_step}"
            raise Stopped(reason, pl_module.stop_signal)


class ProbeCallback(Callback, ABC):
    """Measures the model on a fixed batch before the first step, every `every` steps, and after the last step.

    Training is bit-identical with and without it: it measures an `unwrapped_copy` and restores the random states. It
    gathers sharded weights, which needs memory for the whole model.

    Args:
        recorder: records the results.
        probe: the data's `probe_batch`, the same on every rank.
        every: steps between measurements.
    """

    def __init__(self, recorder: Recorder, probe: Batch, every: int):
        self.recorder, self.probe, self.every = recorder, probe, every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self.measure_copy(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.measure_copy(trainer, pl_module)

    def measure_copy(self, trainer: Trainer, pl_module: Any) -> None:
        started = time.perf_counter()
        with isolate_rng():
            self.measure(trainer, pl_module, unwrapped_copy(pl_module.network).to(trainer.strategy.root_device).eval())
        self.recorder.measure_seconds += time.perf_counter() - started

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: Any, network: Any) -> None:
        """Measure `network` and record the result; every rank calls this at the same steps."""

    def add_figure(self, trainer: Trainer, name: str, plot: Callable[[], Figure]) -> None:
        """Add a figure to the loggers if `is_figure_step`."""
        if trainer.is_global_zero and is_figure_step(trainer.global_step, self.every, trainer.max_steps):
            log_figure(trainer, name, plot)


class LayerStatisticsCallback(ProbeCallback):
    """Records activation variances and gradient norms of every layer as the series `layers`.

    Each rank processes a share of the probe; the statistics are summed over the ranks.
    """

    def measure(self, trainer: Trainer, pl_module: Any, network: Any) -> None:
        with trainer.precision_plugin.forward_context():
            statistics = pl_module.statistics(network, self.probe.to(trainer.strategy.root_device))
        self.recorder.add(
            trainer,
            "layers",
            variance=statistics.residual,
            attention_variance=statistics.attention,
            ffn_variance=statistics.ffn,
            gradient_norm=statistics.gradient_norm,
        )
        if trainer.global_step:
            series = self.recorder.history["layers"]
            self.add_figure(trainer, "variance by layer", lambda: plot_variance(series["step"], series["variance"]))


class MeasureCallback(ProbeCallback):
    """Records one of `TRAINING_MEASURES` as a series: its values by layer, without values of layer pairs.

    Every rank measures the whole probe, because maxima, spectra and standard errors are not sums over sequences.

    The model is measured in the precision of its weights, as by the command `measure`.
    """

    def __init__(self, recorder: Recorder, probe: Batch, every: int, name: str):
        super().__init__(recorder, probe, every)
        self.name = name

    def measure(self, trainer: Trainer, pl_module: Any, network: Any) -> None:
        """Measure `network` and record the result.

        Raises:
            UserError: this measure does not apply to the model or the probe; after step 0 a warning instead.
        """
        model = ModelAdapter(network, f"step {trainer.global_step}")
        batches = self.probe.split(pl_module.micro_batch_size)
        try:
            result = TRAINING_MEASURES[self.name](model, batches, pl_module.pad_id, None)
        except UserError as error:
            if trainer.global_step == 0:
                raise UserError(f"trainer.measures.{self.name}: {error}") from error
            rank_zero_warn(f"step {trainer.global_step}: {self.name} is skipped: {error}")
            return
        self.recorder.add(trainer, self.name, **MEASURES[self.name].recorded(result))
        if MEASURES[self.name].is_map:
            self.add_figure(trainer, self.name, result.plot)


def is_figure_step(step: int, every: int, max_steps: int) -> bool:
    """Whether to draw a figure at a measurement; limits a run to `MAX_FIGURES` + 1 figures.

    True at step 0, and at the first measurement at or after each multiple of `max_steps / MAX_FIGURES`.
    """
    return step * MAX_FIGURES // max_steps > (step - every) * MAX_FIGURES // max_steps


class ProgressLines(Callback):
    """Prints one line per logged step to stderr; for output that is not a terminal."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def print_line(self, trainer: Trainer, *columns: str) -> None:
        if trainer.is_global_zero:
            line = "  ".join([f"step {trainer.global_step:>6}/{trainer.max_steps}", *columns])
            print(line, file=sys.stderr, flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        series = self.recorder.history["train"]
        if series["step"][-1] == trainer.global_step:
            last = {name: values[-1] for name, values in series.items()}
            left = (trainer.max_steps - trainer.global_step) * last["tokens"] / trainer.global_step
            self.print_line(
                trainer,
                f"loss {last['loss']:.4f}",
                f"lr {last['lr']:.2e}",
                f"{last['tokens_per_second']:,.0f} tokens/s",
                f"{left / last['tokens_per_second']:,.0f} s left",
            )

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        metrics = trainer.callback_metrics
        names = printed_metrics(metrics, pl_module.config.protocol)
        self.print_line(trainer, *(f"{name} {metrics[name]:{METRIC_FORMATS[name]}}" for name in names))


class ProgressBar(RichProgressBar):
    """A bar over the steps of the run with time left, loss and tokens/s."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Lightning's columns with a narrower bar and without batches/s; they fit in 80 characters."""
        columns = [c for c in super().configure_columns(trainer) if type(c).__name__ != "ProcessingSpeedColumn"]
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = 12
        return columns

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        return {
            name: f"{float(metrics[name]):{form}}"
            for name, form in (("loss", ".3f"), ("tokens/s", ",.0f"))
            if name in metrics
        }

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"
