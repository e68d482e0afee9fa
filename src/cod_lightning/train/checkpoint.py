"""Checkpoints: plain data, replaced atomically, found again by their step."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from cod_lightning.errors import UserError

BEST = "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a file under its final name is always whole.

    One that cannot be written is told in `failure` and not raised: the other ranks wait in a barrier for the writer.
    `Checkpoints` raises it on all of them. What was there before stays.
    """

    failure: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer.
            partial.unlink(missing_ok=True)
            self.failure = f"{path}: the checkpoint cannot be written ({error}); earlier ones are kept"
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return resumable(Path(path))


RESUMED = ("pytorch-lightning_version", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")
"""What Lightning needs besides the weights to go on."""


def resumable(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint that a run can go on from; arguments and errors are those of `read_checkpoint`.

    Raises:
        UserError: also, it has weights alone.
    """
    checkpoint = read_checkpoint(path, mmap)
    if missing := [name for name in RESUMED if name not in checkpoint]:
        raise UserError(
            f"{path}: holds weights, but not {missing[0]}, without which no run goes on: remove it, or start another "
            f"run from it with init_from={path}"
        )
    return checkpoint


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; nothing in the file is executed, and a byte that changed is found.

    Args:
        path: of the file.
        mmap: read a tensor when it is used, of a file that stays: for a decoder without its optimizer.

    Raises:
        UserError: the file is missing, damaged, or holds more than plain data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:  # torch writes checksums and does not compare them
                raise ValueError(f"the checksum of {damaged} is not that of its bytes")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not is_checkpoint(checkpoint):
            raise ValueError("it holds no decoder")
    except Exception as error:  # damaged bytes raise nearly everything, in zipfile, in torch and in its unpickler
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a readable checkpoint ({reason}); remove it to go on from an earlier one, or start anew with "
            "resume=false"
        ) from error
    return checkpoint


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Every parameter that does not have the same shape in both, with its shapes."""
    here, there = ({name: list(tensor.shape) for name, tensor in state.items()} for state in (ours, theirs))
    return [
        f"{name} is {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]


def is_checkpoint(content: Any) -> bool:
    """Whether content that was read has the weights, by name, and the number of tokens that they have seen."""
    if not isinstance(content, dict):
        return False
    state, tokens = content.get("state_dict"), content.get("tokens")
    return (
        isinstance(tokens, int)
        and isinstance(state, dict)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items())
    )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder by step, oldest first."""
    found = ((re.fullmatch(r"step-(\d+)\.ckpt", path.name), path) for path in folder.glob("step-*.ckpt"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


class Checkpoints(Checkpoint):
    """Saves every `every` steps and at the last one, keeps the newest `keep` and the best by validation loss.

    Where a validation is due at the same step it comes first, so that a checkpoint always holds everything up to its
    step and a resumed run neither repeats nor misses a validation.
    """

    def __init__(self, folder: Path, every: int, keep: int, val_every: int):
        self.folder, self.every, self.keep, self.val_every = folder, every, keep, val_every
        self.io = AtomicCheckpointIO()
        self.best = float("inf")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            for partial in self.folder.glob(".*.partial"):
                partial.unlink()  # of a process that was killed while writing

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def due(self, trainer: Trainer) -> bool:
        return trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.due(trainer) and trainer.global_step % self.val_every:
            self.save_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = float(trainer.callback_metrics["val_loss"])
        if loss < self.best:
            self.best = loss
            # Before the checkpoint of this step: a run that is killed between the two comes by here again.
            self.save(trainer, BEST)
        if trainer.state.fn == "fit" and self.due(trainer):
            self.save_step(trainer)

    def save_step(self, trainer: Trainer) -> None:
        self.save(trainer, f"step-{trainer.global_step:08d}.ckpt")
        if trainer.is_global_zero:
            for old in checkpoints(self.folder)[: -self.keep]:
                old.unlink()

    def save(self, trainer: Trainer, name: str) -> None:
        """Save on all ranks.

        Raises:
            UserError: on every rank, if the file cannot be written.
        """
        trainer.save_checkpoint(self.folder / name)
        if failure := trainer.strategy.broadcast(self.io.failure):
            raise UserError(failure)
