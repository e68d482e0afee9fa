"""Rows of a prepared set by their number, from a local folder or from a store that litdata can read."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch
from litdata.streaming.downloader import get_downloader
from litdata.streaming.item_loader import TokensLoader as LitdataTokensLoader
from litdata.streaming.sampler import ChunkedIndex
from torch import Tensor
from torch.utils.data import Dataset

from cod_lightning.data.manifest import MANIFEST, TOKENIZER, Manifest, Split, damage, read_manifest
from cod_lightning.data.order import WINDOW_CHUNKS
from cod_lightning.errors import UserError

OPEN_CHUNKS = 2 * WINDOW_CHUNKS
"""Chunks kept mapped: those of the window being read, and of the one before or after it."""
CACHE_SHARE = 0.75
"""Of the free disk, what chunks of a remote set may take."""


def is_remote(source: str) -> bool:
    """Return whether `source` is a URL for litdata (`s3://`, `gs://`, ..., `local:`) and not a local folder."""
    return re.match(r"[a-z][a-z0-9]+:", source) is not None


def open_set(source: str) -> tuple[Manifest, str]:
    """Return the manifest of the set at `source`, and its tokenizer.json; a local set is checked for missing files.

    Raises:
        UserError: Not a prepared set, not reachable, or files are missing or have the wrong size.
    """
    if is_remote(source):
        with tempfile.TemporaryDirectory() as folder:
            text = _download(source, MANIFEST, folder).decode(errors="replace")
            manifest = Manifest.from_json(text, f"{source}/{MANIFEST}")
            return manifest, _tokenizer(manifest, _download(source, TOKENIZER, folder), f"{source}/{TOKENIZER}")
    manifest = read_manifest(Path(source))
    missing = damage(Path(source), manifest)
    if missing:
        raise UserError("\n".join([f"the prepared set {source} is not whole; prepare it again:", *missing]))
    path = Path(source) / TOKENIZER
    return manifest, _tokenizer(manifest, path.read_bytes(), str(path))


def _tokenizer(manifest: Manifest, content: bytes, where: str) -> str:
    if hashlib.sha256(content).hexdigest() != manifest.tokenizer.sha256:
        raise UserError(f"{where} is damaged: its SHA-256 is not that of the manifest; {_REMEDY}")
    return content.decode()


def _download(source: str, name: str, folder: str) -> bytes:
    target = os.path.join(folder, name)
    try:
        get_downloader(source, folder, []).download_file(f"{source.rstrip('/')}/{name}", target)
        return Path(target).read_bytes()
    except Exception as error:  # each store has exceptions of its own
        raise UserError(f"{source} is not a prepared set ({name} cannot be fetched: {error})") from error


class TokenRows(Dataset):
    """The rows of one split of the set at `source`, in the order in which they are stored.

    litdata brings chunks in. The first time a process reads one, its SHA-256 is compared with the manifest. Chunks of a
    remote set are kept under `cache`, in a folder named after the fingerprint.
    """

    def __init__(self, source: str, manifest: Manifest, split: str, cache: Path | None = None) -> None:
        self.source = f"{source.rstrip('/')}/{split}"
        self.cache = str(cache / manifest.fingerprint[:16] / split) if cache and is_remote(source) else None
        self.split: Split = manifest.split(split)
        self.width = manifest.width
        self.dtype = np.dtype(manifest.dtype)
        self.ends = np.cumsum([chunk.rows for chunk in self.split.chunks])
        self._open()

    def _open(self) -> None:
        self._dataset: litdata.StreamingDataset | None = None
        self._chunks: OrderedDict[int, np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Files, maps and threads belong to a process: a copy in another one opens its own."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_dataset", "_chunks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self.split.rows

    def __getitem__(self, index: int) -> Tensor:
        """Return row `index`: int64 [width]."""
        return self.read(np.array([index]))[0]

    def __getitems__(self, rows: Any) -> list[Tensor]:
        """Return many rows at once, as the DataLoader asks for them."""
        return list(self.read(np.asarray(rows)))

    def read(self, rows: np.ndarray) -> Tensor:
        """Return the rows numbered `rows` [n], in that order: int64 [n, width], as `width_of` has it.

        Raises:
            IndexError: A number is negative or too large.
            UserError: A chunk is missing, cannot be fetched, or is not what the manifest says.
        """
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.source}, which has {len(self)}")
        out = np.empty((rows.size, self.width), np.int64)
        chunk_of = np.searchsorted(self.ends, rows, side="right")
        for chunk in np.unique(chunk_of):
            wanted = chunk_of == chunk
            out[wanted] = self._chunk(int(chunk))[rows[wanted] - (self.ends[chunk] - self.split.chunks[chunk].rows)]
        return torch.from_numpy(out)

    def _chunk(self, chunk: int) -> np.ndarray:
        """All rows of one chunk: [rows, width], mapped."""
        if chunk in self._chunks:
            self._chunks.move_to_end(chunk)
            return self._chunks[chunk]
        try:
            if self._dataset is None:
                self._dataset = litdata.StreamingDataset(
                    self.source,
                    cache_dir=self.cache,
                    item_loader=TokensLoader(self.split, self.width, self.dtype),
                    max_cache_size=CACHE_SHARE,
                )
            index = int(self.ends[chunk]) - self.split.chunks[chunk].rows
            loaded = self._dataset[ChunkedIndex(index=index, chunk_index=chunk)]
        except UserError:
            raise
        except Exception as error:  # each store has exceptions of its own
            raise UserError(f"{self.source}/{self.split.chunks[chunk].name} cannot be read: {error}") from error
        self._chunks[chunk] = loaded
        if len(self._chunks) > OPEN_CHUNKS:
            self._chunks.popitem(last=False)
        return loaded


class TokensLoader(LitdataTokensLoader):
    """Gives whole chunks, checked, where litdata's loader gives single rows; named like it, as litdata compares.

    A chunk once mapped stays readable as long as its array lives, whatever litdata evicts from its cache meanwhile.
    """

    def __init__(self, split: Split, width: int, dtype: np.dtype) -> None:
        super().__init__(block_size=width)
        self.split, self.width, self.dtype = split, width, dtype
        self.verified: set[int] = set()

    def load_item_from_chunk(
        self, index: int, chunk_index: int, chunk_filepath: str, begin: int, filesize_bytes: int
    ) -> Any:
        """Return the rows of a chunk: array [rows, width] of the stored type, mapped from the file."""
        # A file appears by a rename, so it is complete when it exists; waiting for its size would wait in vain for one
        # that is too short. The comparison below is what decides.
        self._wait_until_chunk_ready(chunk_index, chunk_filepath, filesize_bytes=1)
        chunk = self.split.chunks[chunk_index]
        content = np.memmap(chunk_filepath, np.uint8, mode="r")
        if chunk_index not in self.verified:
            if content.size != chunk.bytes:
                raise UserError(
                    f"{chunk_filepath} is damaged: {content.size:,} bytes instead of {chunk.bytes:,}; {_REMEDY}"
                )
            if hashlib.sha256(content.data).hexdigest() != chunk.sha256:
                raise UserError(f"{chunk_filepath} is damaged: its SHA-256 is not that of the manifest; {_REMEDY}")
            self.verified.add(chunk_index)
        # Rows end with the file; what stands before them is litdata's own.
        rows = content[content.size - chunk.rows * self.width * self.dtype.itemsize :]
        return rows.view(self.dtype).reshape(chunk.rows, self.width)

    def pre_load_chunk(self, chunk_index: int, chunk_filepath: str) -> None:
        """Nothing: litdata calls this from its download thread, where an error would be lost."""

    def close(self, chunk_index: int) -> None:
        """Nothing to close: maps close with their arrays."""

    def delete(self, chunk_index: int, chunk_filepath: str) -> None:
        self.verified.discard(chunk_index)
        Path(chunk_filepath).unlink(missing_ok=True)


_REMEDY = "prepare the set again, or fetch the file anew"
