"""What a run records while it trains."""

from __future__ import annotations

import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import BarColumn
from torch import Tensor

from cod_lightning.config.schema import COUNTS, FIGURES
from cod_lightning.errors import Stopped, UserError
from cod_lightning.measure.activation_stats import plot_variance
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.jacobian import Jacobian, jacobian
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.result import Progress
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.parallel import unwrapped_copy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = dict[str, dict[str, list[Any]]]
"""Series by kind (`train`, `val`, `layers`, and the names of measures); each holds equally long lists, `step` among
them. An entry of a measure is a list over the blocks `layer`, or over all from the first where there is no `layer`."""

MOST_FIGURES = 8
"""TensorBoard gets so many figures of a measure over a run, and one of its start (see `worth_a_figure`)."""


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
        self.measure_seconds = 0.0
        self.wall_seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "tokens": self.tokens,
            "train_seconds": self.train_seconds,
            "measure_seconds": self.measure_seconds,
            "wall_seconds": self.wall_seconds + time.perf_counter() - self.began,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
        self.tokens = state_dict["tokens"]
        self.train_seconds = state_dict["train_seconds"]
        self.measure_seconds = state_dict.get("measure_seconds", 0.0)
        self.wall_seconds = state_dict["wall_seconds"]

    def add(self, trainer: Trainer, kind: str, **values: Any) -> None:
        """Append one entry to a series, and log its numbers."""
        series = self.history.setdefault(kind, {})
        for name, value in {"step": trainer.global_step, **values}.items():
            series.setdefault(name, []).append(value)
        for logger in trainer.loggers:
            numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
            lists = {name: value for name, value in values.items() if isinstance(value, list) and name != "layer"}
            for name, value in lists.items():
                group = name if kind == "layers" else f"{kind}_{name}"
                by_layer = zip(values.get("layer") or count(1), value, strict=False)
                numbers |= {f"{group}/layer_{layer:02d}": number for layer, number in by_layer if number is not None}
            logger.log_metrics(numbers, step=trainer.global_step)

    @property
    def last_validation(self) -> int | None:
        """The step of the last recorded validation."""
        return self.history["val"]["step"][-1] if "val" in self.history else None

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
        if self.last_validation == trainer.global_step:
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
            "measure_seconds": self.measure_seconds,
            "wall_seconds": self.wall_seconds + time.perf_counter() - self.began,
        }


class StopOnSignal(Callback):
    """Takes SIGTERM, with which schedulers announce the end, for a wish to stop after the step or validation batch.

    All ranks learn of it together. After a step `Checkpoints` saves and stops; before a validation it saved already.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.listen(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.listen(pl_module)

    def listen(self, pl_module: Any) -> None:
        """In the place of Lightning's own handler, which talks to other ranks in the middle of anything."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: setattr(pl_module, "stop_asked", True))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *arguments: Any, **named: Any) -> None:
        if pl_module.sum_over_ranks(torch.tensor(int(pl_module.stop_asked))).item():
            raise Stopped(f"stopped as asked, in the validation after step {trainer.global_step}")


class ProbeCallback(Callback, ABC):
    """Measures the decoder on a fixed batch before the first step, every `every` steps and after the last one.

    Training continues bit-identically: the measures see an `unwrapped_copy`, and random states are restored. Sharded
    weights are gathered for it, which takes the memory of the whole model.

    Args:
        recorder: keeps what is found.
        probe: rows of the data's `probe_batch`, the same on every rank.
        every: steps between measurements.
    """

    def __init__(self, recorder: Recorder, probe: Any, every: int):
        self.recorder, self.probe, self.every = recorder, probe, every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self.undisturbed(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.undisturbed(trainer, pl_module)

    def undisturbed(self, trainer: Trainer, pl_module: Any) -> None:
        began = time.perf_counter()
        with isolate_rng():
            self.measure(trainer, pl_module, unwrapped_copy(pl_module.network).to(trainer.strategy.root_device).eval())
        self.recorder.measure_seconds += time.perf_counter() - began

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: Any, network: Any) -> None:
        """Measure `network` and record it; every rank calls this at the same steps."""

    def draw(self, trainer: Trainer, name: str, plot: Callable[[], Figure]) -> None:
        """Draw what was just measured into TensorBoard, where it is `worth_a_figure`."""
        step = trainer.global_step
        if trainer.is_global_zero and worth_a_figure(step, self.every, trainer.max_steps):
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(name, plot(), global_step=step)


class LayerStatisticsCallback(ProbeCallback):
    """Variances and gradient norms of every layer, as the series `layers`.

    Every rank takes its share of the rows, and all find the statistics of the whole probe.
    """

    def measure(self, trainer: Trainer, pl_module: Any, network: Any) -> None:
        with trainer.precision_plugin.forward_context():
            found = pl_module.statistics(
                network, pl_module.transfer_batch_to_device(self.probe, trainer.strategy.root_device, 0)
            )
        self.recorder.add(
            trainer,
            "layers",
            variance=found.residual,
            attention_variance=found.attention,
            ffn_variance=found.ffn,
            gradient_norm=found.gradient_norm,
        )
        if trainer.global_step:
            series = self.recorder.history["layers"]
            self.draw(trainer, "variance by layer", lambda: plot_variance(series["step"], series["variance"]))


class MeasureCallback(ProbeCallback):
    """One of `IN_TRAINING`, as a series of its name: what it finds of each layer, not what it finds of pairs.

    Every rank measures all rows. Largest values, spectra and standard errors are no sums over rows, and each rank has
    all that it takes: so all find the same in the time that one alone would need, and none waits for another.

    The decoder is measured in the precision of its weights, as the command `measure` does it with a checkpoint.

    Args:
        recorder: keeps what is found.
        probe: tokens [rows, length], the same on every rank.
        every: steps between measurements.
        name: of the measure.
    """

    def __init__(self, recorder: Recorder, probe: Tensor, every: int, name: str):
        super().__init__(recorder, probe, every)
        self.name = name

    def measure(self, trainer: Trainer, pl_module: Any, network: Decoder) -> None:
        """Measure `network` and record it.

        Raises:
            UserError: decoder or probe are none for this measure; once steps have been made, that is a warning.
        """
        model, batches = (
            ModelAdapter(network, f"step {trainer.global_step}"),
            self.probe.split(pl_module.micro_batch_size),
        )
        try:
            result = IN_TRAINING[self.name](model, batches, pl_module.pad_id, lambda done, total: None)
        except UserError as error:
            if trainer.global_step == 0:
                raise UserError(f"trainer.measures.{self.name}: {error}") from error
            rank_zero_warn(f"step {trainer.global_step}, {self.name} is left out: {error}")
            return
        self.recorder.add(trainer, self.name, **MEASURES[self.name].recorded(result))
        if MEASURES[self.name].is_map:
            self.draw(trainer, self.name, result.plot)


def worth_a_figure(step: int, every: int, max_steps: int) -> bool:
    """Whether a measurement is the first in one of `MOST_FIGURES` equal parts of the run, or its last one.

    So there are at most `MOST_FIGURES` + 1 figures, however long the run and however often it is measured.

    Args:
        step: of the measurement.
        every: steps since the one before.
        max_steps: of the run.
    """
    return step * MOST_FIGURES // max_steps > (step - every) * MOST_FIGURES // max_steps


def few_jacobians(model: ModelAdapter, batches: Sequence[Tensor], pad_id: int | None, progress: Progress) -> Jacobian:
    """Jacobians of eight layers at one token of four rows.

    Tokens and probes are the same at every step, so that what changes is the model. Two iterations leave the largest
    singular value 1 to 2% low, in the first layer up to 12%.
    """
    rows = torch.cat(tuple(batches))[:4]
    return jacobian(model, [rows], pad_id, progress, layers=model.evenly_spaced(8), tokens=1, probes=4, iterations=2)


IN_TRAINING: dict[str, Callable[..., Any]] = {**MEASURES, "jacobian": few_jacobians}
"""The measures by name, as they are taken while a model trains."""


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
