"""Checkpoints: plain data, replaced atomically, found again by their step.

One is a file; or, of a sharded run, a folder in which `torch.distributed.checkpoint` keeps the tensors under their
paths in the checkpoint, and `rest.pt` holds what is no tensor. Both read as the same.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from cod_lightning.errors import Stopped, UserError, first_line

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run folder."""
BEST = "best.ckpt"
REST = "rest.pt"
"""In a folder, the checkpoint without its tensors."""


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
            put_in_place(partial, path)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer.
            partial.unlink(missing_ok=True)
            self.failure = f"{path}: the checkpoint cannot be written ({error}); earlier ones are kept"
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def save_parts(
        self, checkpoint: dict[str, Any], path: Path, first: bool, broadcast: Callable[[str | None], str | None]
    ) -> None:
        """Write a folder in which each rank puts its part of the tensors; all ranks call this.

        Args:
            checkpoint: as Lightning makes it, its tensors sharded.
            path: of the folder; another checkpoint there is replaced.
            first: whether this is the rank that writes what all have.
            broadcast: gives all ranks what the first one has.
        """
        partial = path.with_name(f".{path.name}.partial")
        rest, tensors = taken_apart(checkpoint)

        def begin() -> None:
            remove(partial)
            partial.mkdir(parents=True)
            torch.save(rest, partial / REST)

        def on_first(act: Callable[[], None]) -> bool:
            """Whether the first rank could do its part, which the others wait for."""
            failure = attempt(act, path) if first else None
            self.failure = broadcast(failure)
            return self.failure is None

        if not on_first(begin):
            return
        # What fails on one rank is raised on all of them.
        self.failure = attempt(lambda: dcp.save(tensors, storage_writer=PlainWriter(partial)), path)
        if self.failure is None:
            on_first(lambda: put_in_place(partial, path))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def attempt(act: Callable[[], object], path: Path) -> str | None:
    """Why a checkpoint could not be written, None if it could."""
    try:
        act()
    except (OSError, RuntimeError, CheckpointException) as error:
        return f"{path}: the checkpoint cannot be written ({first_line(error)}); earlier ones are kept"
    return None


RESUMED = ("pytorch-lightning_version", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")
"""What Lightning needs besides the weights to go on."""


def read_resumable(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that a run can go on from, read when it is used; of a folder what is no tensor.

    Raises:
        UserError: as `read_checkpoint`, or it has weights alone.
    """
    checkpoint = plain_data(path / REST, path) if path.is_dir() else plain_data(path, path, mmap=True)
    if missing := [name for name in RESUMED if name not in checkpoint]:
        raise UserError(
            f"{path}: holds weights, but not {missing[0]}, without which no run goes on: remove it, or start another "
            f"run from it with init_from={path}"
        )
    return checkpoint


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, file or folder, whole and on the CPU; nothing in it is executed.

    A byte of a file that changed is found; of a folder only in `rest.pt`.

    Args:
        path: of the file or folder.
        mmap: read a tensor when it is used, of a file that stays: for a decoder without its optimizer.

    Raises:
        UserError: it is missing, damaged, or holds more than plain data.
    """
    if path.is_dir():
        return read_parts(path, {}, [])
    return plain_data(path, path, mmap)


def plain_data(path: Path, checkpoint: Path, mmap: bool = False) -> dict[str, Any]:
    """What a file at `path` of a checkpoint holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:  # torch writes checksums and does not compare them
                raise ValueError(f"the checksum of {damaged} is not that of its bytes")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not is_checkpoint(content):
            raise ValueError("it holds no decoder")
    except Exception as error:  # damaged bytes raise nearly everything, in zipfile, in torch and in its unpickler
        raise unreadable(checkpoint, error) from error
    return content


def read_parts(path: Path, parameters: Mapping[str, Tensor], moments: Sequence[Mapping[int, Tensor]]) -> dict[str, Any]:
    """The content of a checkpoint that is a folder.

    Args:
        path: of the folder.
        parameters: by name; those that are given are set in place, sharded or not.
        moments: for each optimizer its parameters by number; where given, what has their shape comes as they are cut.

    Raises:
        UserError: it is damaged, holds more than plain data, or parameters of another shape.
    """
    checkpoint = plain_data(path / REST, path)
    try:
        reader = PlainReader(path)
        sizes = reader.read_metadata().state_dict_metadata
        tensors = {}
        for name, entry in sizes.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{name} is no tensor")
            part, *inside = name.split(SEPARATOR)
            like = parameters.get(inside[0]) if part == "state_dict" else None
            if part == "optimizer_states" and moments:
                like = moments[int(inside[0])][int(inside[2])]
            if like is not None and like.shape == entry.size:
                tensors[name] = like.detach() if part == "state_dict" else torch.empty_like(like, requires_grad=False)
            elif like is not None and part == "state_dict":
                raise ValueError(f"{inside[0]} is {list(entry.size)} there, {list(like.shape)} here")
            else:
                tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        if missing := parameters.keys() - {name.partition(SEPARATOR)[2] for name in sizes}:
            raise ValueError(f"{min(missing)} is missing")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
            dcp.load(tensors, storage_reader=reader, no_dist=not parameters)
        return put_together(checkpoint, tensors)
    except (Exception, CheckpointException) as error:  # as in `plain_data`; torch's is no Exception
        raise unreadable(path, error) from error


def unreadable(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"{path}: not a readable checkpoint ({first_line(error)}); remove it to go on from an earlier one, or start "
        "anew with resume=false"
    )


class PlainWriter(FileSystemWriter):
    """Writes no path of this machine into the list of tensors."""

    def storage_meta(self) -> None:
        return None


class PlainReader(FileSystemReader):
    """Reads the list of tensors without executing what a pickle may ask for: it can name torch's descriptions alone."""

    def read_metadata(self, *arguments: Any, **named: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = Descriptions(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError("it has no list of tensors")
        return metadata


class Descriptions(pickle.Unpickler):
    ALLOWED = (
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        *(
            (f"torch.distributed.checkpoint.{module}", name)
            for module, name in (
                ("metadata", "Metadata"),
                ("metadata", "MetadataIndex"),
                ("metadata", "TensorStorageMetadata"),
                ("metadata", "ChunkStorageMetadata"),
                ("metadata", "TensorProperties"),
                ("metadata", "_MEM_FORMAT_ENCODING"),
                ("metadata", "StorageMeta"),
                ("filesystem", "_StorageInfo"),
            )
        ),
    )

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module == "torch" or (module, name) in self.ALLOWED else None
        if (module, name) in self.ALLOWED or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


SEPARATOR = "/"
"""Between the keys of a tensor's path in a checkpoint; none of them holds one."""


def taken_apart(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint without the tensors of model and optimizers, and these by their paths."""
    tensors = dict(paths({name: checkpoint[name] for name in PARTS if name in checkpoint}))
    states = [state | {"state": {}} for state in checkpoint.get("optimizer_states", ())]
    return {**checkpoint, "state_dict": {}, "optimizer_states": states}, tensors


PARTS = ("state_dict", "optimizer_states")


def paths(tree: Any, *keys: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield SEPARATOR.join(keys), tree
    elif isinstance(tree, Mapping | list):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from paths(value, *keys, str(key))


def put_together(rest: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `taken_apart` took apart."""
    for name, tensor in tensors.items():
        part, *keys = name.split(SEPARATOR)
        if part == "state_dict":
            rest[part][keys[0]] = tensor
        else:
            number, _, parameter, moment = keys
            rest[part][int(number)]["state"].setdefault(int(parameter), {})[moment] = tensor
    return rest


def put_in_place(new: Path, path: Path) -> None:
    """Give a checkpoint its name; where one of both is a folder, what had that name before is gone for a moment."""
    if path.exists() and (path.is_dir() or new.is_dir()):
        old = path.with_name(f".{path.name}.old.partial")
        remove(old)
        path.rename(old)
        new.rename(path)
        remove(old)
    else:
        os.replace(new, path)


def remove(path: Path) -> None:
    """Remove a checkpoint or what was begun of one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


STEP = re.compile(r"step-(\d+)\.ckpt")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder by step, oldest first."""
    return sorted((path for path in folder.glob("step-*.ckpt") if STEP.fullmatch(path.name)), key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest step in a folder, None if it has none."""
    return next(reversed(checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is named after."""
    return int(checkpoint.stem.removeprefix("step-"))


class Checkpoints(Checkpoint):
    """Saves every `every` steps, before every validation, and after the last step or one after which a rank must stop.

    Keeps the newest `keep`, and the best by validation loss. A run that was stopped in a validation begins with it, so
    that none is repeated or missed.
    """

    def __init__(self, folder: Path, every: int, keep: int, val_every: int):
        self.folder, self.every, self.keep, self.val_every = folder, every, keep, val_every
        self.io = AtomicCheckpointIO()
        self.best = float("inf")
        self.validated = 0
        """The last step that was."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Clear away what was begun and not finished, and compare what the ranks see.

        Raises:
            UserError: they would go on from different steps.
        """
        if stage == "fit":
            mine = [path.name for path in checkpoints(self.folder)[-1:]]
            first = trainer.strategy.broadcast(mine)
            if pl_module.sum_over_ranks(torch.tensor(int(mine != first))).item():
                raise UserError(
                    f"{self.folder}: the first rank sees {first[0] if first else 'no checkpoint'} there, another "
                    f"{mine[0] if mine else 'none'}: the run's folder must be on a file system that all nodes share"
                )
        if trainer.is_global_zero:
            for partial in self.folder.glob(".*.partial"):
                remove(partial)  # of a process that was killed while writing

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self.validated = state_dict.get("validated", self.validated)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step and step % self.val_every == 0 and self.validated < step:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.restarting = False  # none of its batches counts
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, stopping = trainer.global_step, pl_module.stopping
        if stopping or step == trainer.max_steps or step % self.every == 0 or step % self.val_every == 0:
            self.save(trainer, f"step-{step:08d}.ckpt")
            if trainer.is_global_zero:
                for old in checkpoints(self.folder)[: -self.keep]:
                    remove(old)
        if stopping and step < trainer.max_steps:
            raise Stopped(f"stopped as asked after step {step}, of which there is a checkpoint")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated = trainer.global_step
        loss = float(trainer.callback_metrics["val_loss"])
        if loss < self.best:
            self.best = loss
            self.save(trainer, BEST)

    def save(self, trainer: Trainer, name: str) -> None:
        """Save on all ranks.

        Raises:
            UserError: on every rank, if the file cannot be written.
        """
        trainer.save_checkpoint(self.folder / name)
        if failure := trainer.strategy.broadcast(self.io.failure):
            raise UserError(failure)
