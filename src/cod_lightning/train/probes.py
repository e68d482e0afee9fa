"""Callbacks that measure the layers of a run on its probe."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from cod_lightning.config.schema import PROBE_ROWS, TrainerConfig
from cod_lightning.data.datamodule import TokenDataModule
from cod_lightning.data.images import ImageDataModule
from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.training import TRAINING_MEASURES, plot_variance
from cod_lightning.nn.parallel import unwrapped_copy
from cod_lightning.rng import isolate_rng
from cod_lightning.train.callbacks import Recorder
from cod_lightning.train.loggers import log_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_FIGURES = 8
"""The number of figures of a measure in the loggers, besides the one of step 0 (see `is_figure_step`)."""


def probe_callbacks(
    settings: TrainerConfig, data: TokenDataModule | ImageDataModule, recorder: Recorder
) -> list[Callback]:
    """Callbacks that measure the layers during training.

    Raises:
        UserError: there are fewer validation rows than `probe_rows`, if it is set.
    """
    measures = {name: every for name, every in settings.measures.items() if every}
    if not settings.stats_every and not measures:
        return []
    probe = data.probe_batch(settings.probe_rows or min(PROBE_ROWS, len(data.val_set)))
    callbacks: list[Callback] = []
    if settings.stats_every:
        callbacks.append(LayerStatisticsCallback(recorder, probe, settings.stats_every))
    callbacks += [MeasureCallback(recorder, probe, every, name) for name, every in measures.items()]
    return callbacks


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
