"""Read and write checkpoints: plain data, replaced atomically, named by step.

A checkpoint is a file, or, for a sharded run, a folder: `torch.distributed.checkpoint` stores the tensors under their
keys joined with "/", and `rest.pt` holds the other entries. Both read as the same dictionary.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from cod_lightning.errors import UserError, first_line, no_permission, short_repr
from cod_lightning.files import open_atomic, partial_path, replace_path, require_utf8
from cod_lightning.nn.weights import why_not_dense

BEST = "best.ckpt"
NON_TENSORS = "rest.pt"
"""The file in a checkpoint folder that holds the entries without tensors."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically; a failed write keeps the previous file.

    A failed write is stored in `failure` instead of raised, because the other ranks wait in a barrier for the writer.
    `Checkpoints` raises it on all ranks.
    """

    failure: str | None = None
    """The message of the last failed write."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_atomic(path, replace_path) as file:
                torch.save(checkpoint, file)

        self.failure = try_write(write, path)

    def save_sharded(
        self, checkpoint: dict[str, Any], path: Path, is_global_zero: bool, broadcast: Callable[[Any], Any]
    ) -> None:
        """Write a checkpoint folder; every rank calls this and writes its shards.

        Args:
            checkpoint: Lightning's checkpoint with sharded tensors.
            path: the folder; an existing checkpoint is replaced.
            is_global_zero: whether this rank is 0, which writes the entries that are not sharded.
            broadcast: returns rank 0's value on all ranks.
        """
        others, tensors = split_tensors(checkpoint)
        partial = path.with_name(broadcast(partial_path(path).name))

        def create_folder() -> None:
            partial.mkdir(parents=True)
            torch.save(others, partial / NON_TENSORS)

        def on_rank_zero(write: Callable[[], None]) -> bool:
            """Call `write` on rank 0; return on all ranks whether it succeeded."""
            self.failure = broadcast(try_write(write, path) if is_global_zero else None)
            return self.failure is None

        if not on_rank_zero(create_folder):
            return
        # dcp.save raises on all ranks if one fails.
        self.failure = try_write(lambda: dcp.save(tensors, storage_writer=PortableWriter(partial)), path)
        if self.failure is None:
            on_rank_zero(lambda: replace_path(partial, path))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def try_write(write: Callable[[], object], path: Path) -> str | None:
    """Call `write`; return None, or the error message if it failed."""
    try:
        write()
    except (OSError, RuntimeError, CheckpointException) as error:  # torch raises RuntimeError if the disk is full
        reason = ("is the disk full? " if "inline_container" in str(error) else "") + first_line(error)
        return f"{path}: the checkpoint cannot be written ({reason}); earlier ones are kept"
    return None


PROGRESS = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.manual_optimization.optim_step_progress")
"""Entries of Lightning's training loop that count epochs, batches and steps."""
RESUMED: dict[tuple[str | int, ...], type] = {
    ("pytorch-lightning_version",): str,
    ("global_step",): int,
    **{("loops", "fit_loop", name, "total", "ready"): int for name in PROGRESS},
    **{("loops", "fit_loop", name, "current", "ready"): int for name in PROGRESS},
    ("callbacks", "Recorder", "history"): dict,
    **{("callbacks", "Recorder", name): float for name in ("tokens", "train_seconds", "wall_seconds")},
    ("callbacks", "Checkpoints", "best"): float,
    ("optimizer_states", 0, "state"): dict,
    ("optimizer_states", 0, "param_groups", 0, "params"): list,
    ("lr_schedulers", 0, "last_epoch"): int,
    ("lr_schedulers", 0, "lr_lambdas"): list,
}
"""What a run needs to resume, besides the weights, by the keys that lead to it, and its type."""


def read_resumable(path: Path) -> dict[str, Any]:
    """A checkpoint from which a run can resume; tensors of a file are memory-mapped, those of a folder are not read.

    Raises:
        UserError: the checkpoint is unreadable, or holds weights only.
    """
    checkpoint = load_file(path, mmap=True)
    if missing := [name for name, *_ in RESUMED if name not in checkpoint]:
        raise UserError(
            f"{path}: holds weights, but not {missing[0]}, which a run needs to resume: remove the file, or start "
            f"another run with init_from={path}"
        )
    fingerprints = {(name, "fingerprint"): str for name in ("TokenDataModule", "ImageDataModule") if name in checkpoint}
    settings: dict[tuple[str | int, ...], type] = {("settings",): dict} if "settings" in checkpoint else {}
    for keys, kind in (RESUMED | fingerprints | settings).items():
        if not isinstance(value := nested(checkpoint, keys), kind) or value == "":
            name, found = ".".join(map(str, keys)), "nothing" if value is None else short_repr(value)
            raise unreadable_error(path, ValueError(f"{name}: expected {kind.__name__}, got {found}"))
    if (step := checkpoint["global_step"]) != step_of(path):
        raise UserError(f"{path}: holds step {step}, not that of its name: rename it to step-{step:08d}.ckpt")
    return checkpoint


def nested(tree: Any, keys: Sequence[str | int]) -> Any:
    """The value to which keys lead in nested mappings and lists; None if there is none."""
    for key in keys:
        try:
            tree = tree[key]
        except (LookupError, TypeError):
            return None
    return tree


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A complete checkpoint on the CPU, read without executing code.

    Checksums are verified for a file; for a folder, those of `rest.pt` only.

    Raises:
        UserError: the checkpoint is missing, damaged, or holds more than plain data.
    """
    return read_sharded(path, {}, []) if path.is_dir() else load_file(path)


def read_for_weights(path: Path) -> dict[str, Any]:
    """`read_checkpoint` without the memory of the optimizer state, twice that of the weights.

    The tensors of a file are memory-mapped, so it must stay; the optimizer state of a folder is not read.
    """
    return read_sharded(path, {}, None) if path.is_dir() else load_file(path, mmap=True)


def load_file(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file, or the entries of a checkpoint folder that are no tensors."""
    require_utf8(path)
    file = path / NON_TENSORS if path.is_dir() else path
    try:
        if not file.is_file():
            raise ValueError(f"a folder without {NON_TENSORS}" if path.is_dir() else "not a regular file")
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            # torch.save only stores: a compressed or overlapping member could expand to any size.
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("it is compressed, but checkpoints are not")
            if sum(member.file_size for member in members) > file.stat().st_size:
                raise ValueError("its members are larger than the file")
            if (damaged := archive.testzip()) is not None:  # torch does not verify checksums
                raise ValueError(f"the checksum of {damaged} does not match its bytes")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        if not is_checkpoint(content):
            raise ValueError("it holds no decoder")
        for name, tensor in content["state_dict"].items():
            if problem := why_not_dense(tensor) or ("" if tensor.is_floating_point() else str(tensor.dtype)):
                raise ValueError(f"{name} is {problem}")
    except Exception as error:  # damaged bytes raise many types, in zipfile, in torch and in its unpickler
        raise unreadable_error(path, error) from error
    return content


def read_sharded(
    path: Path, parameters: Mapping[str, Tensor], optimizer_parameters: Sequence[Mapping[int, Tensor]] | None
) -> dict[str, Any]:
    """Read a checkpoint folder.

    Args:
        path: the folder.
        parameters: by name, sharded or not; the checkpoint's values are loaded into these in place.
        optimizer_parameters: for each optimizer its parameters by number; state of a parameter's shape is sharded as
            the parameter. If empty, the state is read unsharded; None: it is not read.

    Raises:
        UserError: the checkpoint is damaged, holds more than plain data, or has parameters of another shape.
    """
    checkpoint = load_file(path)
    try:
        reader = SafeReader(path)
        sizes = reader.read_metadata().state_dict_metadata
        tensors = {}
        for name, entry in sizes.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{name} is not a tensor")
            section, *keys = name.split(SEPARATOR)
            if section == "optimizer_states" and optimizer_parameters is None:
                continue
            like = parameters.get(keys[0]) if section == "state_dict" else None
            if section == "optimizer_states" and optimizer_parameters:
                like = optimizer_parameters[int(keys[0])][int(keys[2])]
            if like is not None and like.shape == entry.size:
                tensors[name] = (
                    like.detach() if section == "state_dict" else torch.empty_like(like, requires_grad=False)
                )
            elif like is not None and section == "state_dict":
                raise ValueError(f"{keys[0]} is {list(entry.size)} in the checkpoint, {list(like.shape)} in this run")
            else:
                tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        if missing := parameters.keys() - {name.partition(SEPARATOR)[2] for name in sizes}:
            raise ValueError(f"{min(missing)} is missing")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process.*")
            dcp.load(tensors, storage_reader=reader, no_dist=not parameters)
        return merge_tensors(checkpoint, tensors)
    except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
        raise unreadable_error(path, error) from error


def unreadable_error(path: Path, error: BaseException) -> UserError:
    """The error for a checkpoint that may not be read, or is damaged; names an earlier one in its folder."""
    if isinstance(error, PermissionError):
        return no_permission(error, path)
    numbered = CHECKPOINT_NAME.fullmatch(path.name)
    earlier = [other for other in list_checkpoints(path.parent) if not numbered or step_of(other) < step_of(path)]
    remedy = "copy it again, or pass resume=false to retrain"
    if earlier:
        remedy = f"{'remove it to use' if numbered else 'use'} {earlier[-1].name}, or {remedy}"
    return UserError(f"{path}: damaged, not a readable checkpoint ({first_line(error)}); {remedy}")


class PortableWriter(FileSystemWriter):
    """Writes the metadata without absolute paths."""

    def storage_meta(self) -> None:
        return None


class SafeReader(FileSystemReader):
    """Reads the pickled metadata with `MetadataUnpickler`, which executes no code."""

    def read_metadata(self, *arguments: Any, **named: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError("it has no metadata")
        return metadata


ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta"),
    },
}
"""The names in modules of torch that describe checkpoint tensors."""


class MetadataUnpickler(pickle.Unpickler):
    """Reads what is `ALLOWED`, and dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        allowed = name in ALLOWED.get(module, ())
        value = super().find_class(module, name) if module == "torch" or allowed else None
        if allowed or isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed")


def enum_member(kind: Any, name: str) -> Enum:
    """The `getattr` of pickled enums, as Python 3.11.0 to 3.11.3 write them; nothing else may call it."""
    if not isinstance(kind, EnumMeta):
        raise pickle.UnpicklingError("it refers to builtins.getattr, which is not allowed")
    return kind[name]


SEPARATOR = "/"
"""Joins the keys that lead to a tensor in a checkpoint; no key contains it."""
TENSOR_KEYS = ("state_dict", "optimizer_states")
"""Entries of a checkpoint that a checkpoint folder stores sharded."""


def split_tensors(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint without the tensors of `TENSOR_KEYS`, and these tensors by joined keys."""
    tensors = dict(named_tensors({name: checkpoint[name] for name in TENSOR_KEYS if name in checkpoint}))
    states = [state | {"state": {}} for state in checkpoint.get("optimizer_states", ())]
    return {**checkpoint, "state_dict": {}, "optimizer_states": states}, tensors


def named_tensors(tree: Any, *keys: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested mappings and lists, with their joined keys."""
    if isinstance(tree, Tensor):
        yield SEPARATOR.join(keys), tree
    elif isinstance(tree, Mapping | list):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from named_tensors(value, *keys, str(key))


def merge_tensors(checkpoint: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `split_tensors`; changes `checkpoint`."""
    for name, tensor in tensors.items():
        section, *keys = name.split(SEPARATOR)
        if section == "state_dict":
            checkpoint[section][keys[0]] = tensor
        else:
            optimizer, _, parameter, key = keys
            checkpoint[section][int(optimizer)]["state"].setdefault(int(parameter), {})[key] = tensor
    return checkpoint


def is_checkpoint(content: Any) -> bool:
    """Whether `content` has weights by name and a number of training tokens."""
    if not isinstance(content, dict):
        return False
    state, tokens = content.get("state_dict"), content.get("tokens")
    return (
        isinstance(tokens, int)
        and isinstance(state, dict)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items())
    )


CHECKPOINT_NAME = re.compile(r"step-(\d+)\.ckpt")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, sorted by step.

    Raises:
        UserError: the folder may not be read.
    """
    try:
        paths = list(folder.iterdir()) if folder.is_dir() else []
    except PermissionError as error:  # with glob the folder would seem empty, and a run would begin again
        raise no_permission(error, folder) from error
    return sorted((path for path in paths if CHECKPOINT_NAME.fullmatch(path.name)), key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the last step in a folder, None if there is no checkpoint."""
    return next(reversed(list_checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's file name."""
    return int(checkpoint.stem.removeprefix("step-"))
