"""What a run records while it trains."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.progress import BarColumn
from torch import Tensor

from cod_lightning.measure.layers import plot_variance
from cod_lightning.train.config import COUNTS, FIGURES

History = dict[str, dict[str, list[Any]]]
"""Series by kind (`train`, `val`, `layers`); each holds equally long lists, `step` among them."""


class Recorder(Callback):
    """Keeps the figures of a run over its steps, through interruptions, and sends them to the loggers.

    Args:
        log_every: steps between recorded training values.
    """

    def __init__(self, log_every: int):
        self.log_every = log_every
        self.history: History = {}
        self.tokens = 0.0
        self.train_seconds = 0.0
        self.wall_seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "tokens": self.tokens,
            "train_seconds": self.train_seconds,
            "wall_seconds": self.wall_seconds + time.perf_counter() - self.began,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
        self.tokens = state_dict["tokens"]
        self.train_seconds = state_dict["train_seconds"]
        self.wall_seconds = state_dict["wall_seconds"]

    def add(self, trainer: Trainer, kind: str, **values: Any) -> None:
        """Append one entry to a series, and log its numbers."""
        series = self.history.setdefault(kind, {})
        for name, value in {"step": trainer.global_step, **values}.items():
            series.setdefault(name, []).append(value)
        for logger in trainer.loggers:
            numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
            lists = {name: value for name, value in values.items() if isinstance(value, list)}
            for name, value in lists.items():
                numbers |= {f"{name}/layer_{layer:02d}": number for layer, number in enumerate(value, start=1)}
            logger.log_metrics(numbers, step=trainer.global_step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.began = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        self.batch_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        seconds = time.perf_counter() - self.batch_began
        self.train_seconds += seconds
        outputs = {name: float(value) for name, value in outputs.items()}
        rate = (outputs["tokens"] - self.tokens) / seconds
        self.tokens = outputs["tokens"]
        pl_module.log_dict(
            {"loss": outputs["loss"], "tokens/s": rate}, prog_bar=True, logger=False, rank_zero_only=True
        )
        if trainer.global_step % self.log_every == 0 or trainer.global_step in (1, trainer.max_steps):
            self.add(trainer, "train", **outputs, tokens_per_second=rate)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.history.get("val", {}).get("step", [None])[-1] == trainer.global_step:
            return
        found = trainer.callback_metrics
        self.add(trainer, "val", **{name: float(found[name]) for name in (*FIGURES, *COUNTS) if name in found})

    def final(self) -> dict[str, Any]:
        """The last validation's figures, tokens and speed."""
        last = {name: values[-1] for name, values in self.history["val"].items() if name != "step"}
        tokens = int(self.history["train"]["tokens"][-1])
        return {
            **last,
            **{name: int(last[name]) for name in COUNTS if name in last},
            "train_loss": self.history["train"]["loss"][-1],
            "tokens": tokens,
            "tokens_per_second": tokens / self.train_seconds,
            "wall_seconds": self.wall_seconds + time.perf_counter() - self.began,
        }


class LayerStatisticsCallback(Callback):
    """Measures every layer on a fixed probe batch, before the first step, every `every` steps and after the last one.

    Args:
        recorder: keeps the series `layers`.
        probe: rows, as `module.statistics` takes them.
        every: steps between measurements.
    """

    def __init__(self, recorder: Recorder, probe: Any, every: int):
        self.recorder, self.probe, self.every = recorder, probe, every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self.measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.measure(trainer, pl_module)

    def measure(self, trainer: Trainer, pl_module: Any) -> None:
        with trainer.precision_plugin.forward_context():
            found = pl_module.statistics(pl_module.transfer_batch_to_device(self.probe, pl_module.device, 0))
        self.recorder.add(
            trainer,
            "layers",
            variance=found.residual,
            attention_variance=found.attention,
            ffn_variance=found.ffn,
            gradient_norm=found.gradient_norm,
        )
        series = self.recorder.history["layers"]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                figure = plot_variance(series["step"], series["variance"])
                logger.experiment.add_figure("variance by layer", figure, global_step=trainer.global_step)


class ProgressLines(Callback):
    """One line per logged step, for output that is not a terminal."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def say(self, trainer: Trainer, line: str) -> None:
        if trainer.is_global_zero:
            print(line, file=sys.stderr, flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        series = self.recorder.history["train"]
        if series["step"][-1] == trainer.global_step:
            left = (trainer.max_steps - trainer.global_step) * series["tokens"][-1] / trainer.global_step
            self.say(
                trainer,
                f"step {trainer.global_step:>6}/{trainer.max_steps}  loss {series['loss'][-1]:.4f}  "
                f"lr {series['lr'][-1]:.2e}  {series['tokens_per_second'][-1]:,.0f} tokens/s  "
                f"{left / series['tokens_per_second'][-1]:,.0f} s left",
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        figures = trainer.callback_metrics
        words = [f"{name} {figures[name]:{form}}" for name, form in FIGURES.items() if name in figures]
        self.say(trainer, "  ".join([f"step {trainer.global_step:>6}/{trainer.max_steps}", *words]))


class ProgressBar(RichProgressBar):
    """A bar over the steps with time left, loss and tokens/s; there are no epochs here."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Lightning's, but a narrower bar and tokens/s instead of batches/s: all of it fits in 80 characters."""
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


def progress(recorder: Recorder, terminal: bool) -> Callback:
    """A bar on a terminal, lines elsewhere."""
    return ProgressBar(leave=True) if terminal else ProgressLines(recorder)
