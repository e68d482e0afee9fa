"""Sequences of a prepared set by index, from a local folder or a store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cod_lightning.data.chunks import REMEDY, DamagedChunkError, Store, check_chunk, chunk_rows, evict_chunks, is_remote
from cod_lightning.data.manifest import MANIFEST, TOKENIZER, Chunk, Manifest, find_damage, read_manifest
from cod_lightning.data.order import WINDOW_CHUNKS
from cod_lightning.data.tokenizers import DocumentTokenizer
from cod_lightning.errors import UserError
from cod_lightning.files import locked, write_atomic

OPEN_CHUNKS = 2 * WINDOW_CHUNKS
"""Chunks that stay mapped: those of the current window and of a neighbouring one."""


def open_set(source: str) -> tuple[Manifest, DocumentTokenizer]:
    """Return the manifest of the set at `source` and its tokenizer; check a local set for missing files.

    Raises:
        UserError: not a prepared set, not reachable, or files are missing or have the wrong size.
    """
    if is_remote(source):
        store = Store(source)
        try:
            text, json = store.read(MANIFEST).decode(errors="replace"), store.read(TOKENIZER)
        except UserError as error:
            raise UserError(f"{source} is not a prepared set ({error})") from error
        manifest = Manifest.from_json(text, f"{source}/{MANIFEST}")
    else:
        manifest = read_manifest(Path(source))
        if damage := find_damage(Path(source), manifest):
            raise UserError("\n".join([f"the prepared set {source} is incomplete; prepare it again:", *damage]))
        json = (Path(source) / TOKENIZER).read_bytes()
    record = manifest.tokenizer
    tokenizer = DocumentTokenizer(json.decode(errors="replace"), record.pad_id, record.eos_id)
    if tokenizer.sha256 != record.sha256:
        raise UserError(f"{source}/{TOKENIZER} is damaged: its SHA-256 differs from the manifest; {REMEDY}")
    return manifest, tokenizer


class TokenDataset(Dataset):
    """The sequences of one split of the set at `source`, in stored order.

    A process compares a chunk with its SHA-256 when it maps the chunk for the first time. Chunks of a URL are cached in
    `cache`/FINGERPRINT/SPLIT and appear there whole; all processes of a machine share them.
    """

    def __init__(self, source: str, manifest: Manifest, split: str, cache: Path = Path("cache")) -> None:
        self.arguments = (source, manifest, split, cache)
        self.source = f"{source.rstrip('/')}/{split}"
        self.remote = is_remote(source)
        self.folder = cache / manifest.fingerprint[:16] / split if self.remote else Path(self.source)
        self.split = manifest.split(split)
        self.width, self.dtype = manifest.row_width, np.dtype(manifest.dtype)
        self.chunk_sizes = tuple(chunk.rows for chunk in self.split.chunks)
        self.ends = np.cumsum(self.chunk_sizes)
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()
        self._verified: set[str] = set()
        self._store: Store | None = None

    def __reduce__(self) -> tuple[type[TokenDataset], tuple[Any, ...]]:
        """A copy in another process opens its own files and connections."""
        return TokenDataset, self.arguments

    def __len__(self) -> int:
        return self.split.rows

    def __getitem__(self, index: int) -> Tensor:
        """Return one sequence: int64 [width]."""
        return self.read(np.array([index]))[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Return a batch, as the DataLoader requests it."""
        return list(self.read(np.asarray(indices)))

    def read(self, indices: np.ndarray) -> Tensor:
        """Return the sequences at `indices` [n], in that order: int64 [n, width]; see `Manifest.row_width`.

        Raises:
            IndexError: an index is negative or too large.
            UserError: a chunk is missing, cannot be downloaded, or differs from the manifest.
        """
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"indices {indices.min()} to {indices.max()} of {self.source}, which has {len(self)}")
        out = np.empty((indices.size, self.width), np.int64)
        chunk_of = np.searchsorted(self.ends, indices, side="right")
        for number in np.unique(chunk_of).tolist():
            selected = chunk_of == number
            first = self.ends[number] - self.chunk_sizes[number]
            out[selected] = self._chunk(number)[indices[selected] - first]
        return torch.from_numpy(out)

    def _chunk(self, number: int) -> np.ndarray:
        """Return all sequences of a chunk, mapped: [rows, width] of the stored type."""
        if number not in self._mapped:
            chunk = self.split.chunks[number]
            content = self._map_remote(chunk) if self.remote else self._map_local(chunk)
            self._mapped[number] = chunk_rows(content, chunk, self.width, self.dtype)
            if len(self._mapped) > OPEN_CHUNKS:
                self._mapped.popitem(last=False)  # the file stays mapped while a caller uses it
        self._mapped.move_to_end(number)
        return self._mapped[number]

    def _map(self, chunk: Chunk) -> np.ndarray:
        """Map the bytes of a chunk; compare them with the manifest the first time."""
        content = np.memmap(self.folder / chunk.name, np.uint8, mode="r")
        if chunk.name not in self._verified:
            check_chunk(content.data, chunk)
            self._verified.add(chunk.name)
        return content

    def _map_local(self, chunk: Chunk) -> np.ndarray:
        try:
            return self._map(chunk)
        except DamagedChunkError as error:
            raise UserError(f"{self.folder / chunk.name} {error}") from error
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise UserError(f"{self.folder / chunk.name} cannot be read: {error}; {REMEDY}") from error

    def _map_remote(self, chunk: Chunk) -> np.ndarray:
        """Map a cached chunk; download it first if it is missing or damaged."""
        path = self.folder / chunk.name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(f"{path.name}.lock")):  # other processes of this machine want the same chunks
                with suppress(DamagedChunkError, FileNotFoundError, ValueError):
                    return self._map(chunk)
                self._store = self._store or Store(self.source)
                content = self._store.read(chunk.name, chunk)
                for leftover in self.folder.glob(f".{path.name}.*.partial"):
                    leftover.unlink(missing_ok=True)  # its process held the lock, so it is dead
                evict_chunks(self.folder, chunk.bytes)
                write_atomic(path, content)
                with suppress(FileNotFoundError):  # another process made room
                    return self._map(chunk)
                return np.frombuffer(content, np.uint8)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error}): free space, or choose another data.root") from error
