"""Callbacks that record, save, report and interrupt a run."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from rich.progress import BarColumn

from cod_lightning import signals
from cod_lightning.config.schema import COUNTS, METRIC_FORMATS, is_shown, printed_metrics
from cod_lightning.errors import Diverged, Stopped, UserError
from cod_lightning.files import remove
from cod_lightning.train.checkpoint import BEST, AtomicCheckpointIO, list_checkpoints, newest_checkpoint
from cod_lightning.train.loggers import layer_scalars

History = dict[str, dict[str, list[Any]]]
"""Series by kind: `train`, `val`, `layers`, and the names of measures.

A series has lists of equal length, one of them `step`. An entry of a measure is a list over the blocks in `layer`, or
over all blocks if the series has no `layer`."""

STOPPING = b"\nfinishing the step to save a checkpoint; Ctrl-C again stops at once, without a checkpoint\n"
"""The answer to the first Ctrl-C."""

LOSSES = {"train/loss": "Loss/train", "val/val_loss": "Loss/val"}
"""Tags of the losses in the loggers: TensorBoard sorts upper case first, so it opens on them."""

TOTALS = ("tokens", "train_seconds", "measure_seconds", "wall_seconds")
"""Attributes of a `Recorder` that grow over the whole run."""


class Recorder(Callback):
    """Records the metrics of a run by step and logs them; its state is saved in checkpoints.

    Args:
        log_every: steps between recorded training metrics.
        protocol: of the run; says which metrics are logged.
    """

    def __init__(self, log_every: int, protocol: str):
        self.log_every, self.protocol = log_every, protocol
        self.history: History = {}
        self.tokens = self.train_seconds = self.measure_seconds = self.wall_seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        totals = {name: getattr(self, name) for name in TOTALS}
        wall_seconds = self.wall_seconds + time.perf_counter() - self.started
        return {"history": self.history, **totals, "wall_seconds": wall_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
        for name in TOTALS:
            setattr(self, name, state_dict.get(name, 0.0))

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


class Checkpoints(Checkpoint):
    """Saves every `every` steps, before each validation, after the last step, and before the run stops on a signal.

    Also saves, without optimizer state, `best.ckpt` after each validation with the lowest loss.

    A run that was interrupted in a validation resumes with it, so that no validation is repeated or missed.

    Args:
        folder: of the checkpoints.
        every: steps between checkpoints.
        keep: the number of newest checkpoints to keep, besides the best by validation loss.
        val_every: steps between validations.
    """

    def __init__(self, folder: Path, every: int, keep: int, val_every: int):
        self.folder, self.every, self.keep, self.val_every = folder, every, keep, val_every
        self.io = AtomicCheckpointIO()
        self.best = float("inf")

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Check that all ranks see the same newest checkpoint, and remove partial files.

        Raises:
            UserError: the ranks would resume from different steps.
        """
        if stage == "fit":
            path = newest_checkpoint(self.folder)
            newest = "missing" if path is None else path.name
            first = trainer.strategy.broadcast(newest)
            if pl_module.sum_over_ranks(torch.tensor(int(newest != first))).item():
                raise UserError(
                    f"{self.folder}: the newest checkpoint is {first} on the first rank, {newest} on another: put the "
                    "run folder on a file system that all nodes share"
                )
        if trainer.is_global_zero:
            for pattern in (".step-*.partial", f".{BEST}.*.partial"):  # `consolidate` may be writing another file
                for partial in self.folder.glob(pattern):
                    remove(partial)  # left by a process that was killed while writing

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step and step % self.val_every == 0:  # its checkpoint is from before the validation
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.restarting = False  # start at its first batch
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        is_due = step == trainer.max_steps or step % self.every == 0 or step % self.val_every == 0
        if pl_module.stop_requested or is_due:
            self.save(trainer, f"step-{step:08d}.ckpt")
            if trainer.is_global_zero:
                for old in list_checkpoints(self.folder)[: -self.keep]:
                    remove(old)
        if pl_module.stop_requested and step < trainer.max_steps:
            raise Stopped(f"interrupted at step {step}; checkpoint saved", pl_module.stop_signal)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        loss, perplexity = float(metrics["val_loss"]), float(metrics.get("ppl", 0.0))
        if not (math.isfinite(loss) and math.isfinite(perplexity)):  # exp(loss) overflows float32 above 88.7
            raise Diverged(
                f"the validation loss is {loss} after step {trainer.global_step}, not finite or too large for a "
                "perplexity: the run is not finished"
            )
        if loss < self.best:
            self.best = loss
            self.save(trainer, BEST)

    def save(self, trainer: Trainer, name: str) -> None:
        """Save a checkpoint; every rank calls this.

        Raises:
            UserError: the checkpoint cannot be written; raised on every rank.
        """
        trainer.save_checkpoint(self.folder / name, weights_only=name == BEST)  # no run resumes from the best one
        if failure := trainer.strategy.broadcast(self.io.failure):
            raise UserError(failure)


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
