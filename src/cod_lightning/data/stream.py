"""Rows of a prepared set by their number, from a local folder or from a store that litdata can read."""

from __future__ import annotations

import hashlib
import re
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import litdata
import numpy as np
import torch
from botocore.config import Config
from botocore.exceptions import ClientError
from filelock import FileLock
from litdata.streaming.downloader import Downloader, get_downloader
from litdata.streaming.item_loader import TokensLoader as LitdataTokensLoader
from litdata.streaming.sampler import ChunkedIndex
from torch import Tensor
from torch.utils.data import Dataset

from cod_lightning.data.manifest import INDEX, MANIFEST, TOKENIZER, Chunk, Manifest, Split, damage, read_manifest
from cod_lightning.data.order import WINDOW_CHUNKS
from cod_lightning.errors import UserError

OPEN_CHUNKS = 2 * WINDOW_CHUNKS
"""Chunks kept mapped: those of the window being read, and of the one before or after it."""
CACHE_SHARE = 0.75
"""Of the free disk, what chunks of a remote set may take."""
ATTEMPTS = 4
"""How often a file of a remote set is asked for before it is given up."""
TIMEOUT = 30.0
"""Seconds without a connection, or without a byte on it, after which an attempt at an `s3://` URL has failed."""
PAUSE = 1.0
"""Seconds between the first two attempts; twice as many before each further one."""
TRANSIENT = (408, 429)
"""Of the HTTP statuses from 400 to 499 those that another attempt may cure."""


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
    target = Path(folder) / name
    url = f"{source.rstrip('/')}/{name}"

    def get() -> bytes:
        downloader = _downloader(source, folder)
        if source.startswith("s3://"):
            # Its download_file takes a client that speaks no http:// and repeats a request for minutes.
            with open(target, "wb") as file:
                downloader.download_fileobj(url, file)
        else:
            downloader.download_file(url, str(target))
        return target.read_bytes()

    try:
        return attempts(url, get)
    except UserError as error:
        raise UserError(f"{source} is not a prepared set ({name} cannot be fetched: {error})") from error


def _downloader(source: str, folder: str) -> Downloader:
    """The client of litdata for a store, making one request an attempt, where by default it makes a thousand."""
    options = {}
    if source.startswith("s3://"):
        options["config"] = Config(connect_timeout=TIMEOUT, read_timeout=TIMEOUT, retries={"total_max_attempts": 1})
    return get_downloader(source, folder, [], options)


Result = TypeVar("Result")


def attempts(url: str, get: Callable[[], Result]) -> Result:
    """Return what `get` does, asked at most `ATTEMPTS` times.

    Raises:
        UserError: The last attempt failed, or one in a way that no other cures; names `url`, attempts and reason.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return get()
        except Exception as error:  # each store has exceptions of its own
            if attempt == ATTEMPTS or _is_final(error):
                reason = str(error) if isinstance(error, _Damaged) else f"cannot be read: {error or repr(error)}"
                count = "1 attempt" if attempt == 1 else f"{attempt} attempts"
                raise UserError(f"{url} {reason} ({count})") from error
        time.sleep(PAUSE * 2 ** (attempt - 1))
    raise AssertionError


def _is_final(error: Exception) -> bool:
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        return 400 <= status < 500 and status not in TRANSIENT
    return isinstance(error, FileNotFoundError)


class _Damaged(Exception):
    """A chunk is not what the manifest says."""


def check(content: np.ndarray, chunk: Chunk) -> None:
    """Compare the bytes of a chunk [n] with the manifest.

    Raises:
        _Damaged: They differ.
    """
    if content.size != chunk.bytes:
        raise _Damaged(f"is damaged: {content.size:,} bytes instead of {chunk.bytes:,}; {_REMEDY}")
    if hashlib.sha256(content.data).hexdigest() != chunk.sha256:
        raise _Damaged(f"is damaged: its SHA-256 is not that of the manifest; {_REMEDY}")


PER_PROCESS = ("_dataset", "_chunks", "_downloader", "_loader")
"""Files, maps, connections and threads of `TokenRows`: a copy in another process opens its own."""


class TokenRows(Dataset):
    """The rows of one split of the set at `source`, in the order in which they are stored.

    litdata keeps and maps the chunks. The first time a process reads one, its SHA-256 is compared with the manifest.
    Those of a remote set are kept under `cache`, in a folder named after the fingerprint, and appear there whole.
    """

    def __init__(self, source: str, manifest: Manifest, split: str, cache: Path | None = None) -> None:
        self.source = f"{source.rstrip('/')}/{split}"
        self.remote = is_remote(source)
        self.cache = cache / manifest.fingerprint[:16] / split if cache and self.remote else None
        self.split: Split = manifest.split(split)
        self.width = manifest.width
        self.dtype = np.dtype(manifest.dtype)
        self.ends = np.cumsum([chunk.rows for chunk in self.split.chunks])
        self._open()

    def _open(self) -> None:
        self._dataset: litdata.StreamingDataset | None = None
        self._chunks: OrderedDict[int, np.ndarray] = OrderedDict()
        self._downloader: Downloader | None = None
        self._loader = TokensLoader(self.split, self.width, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in PER_PROCESS}

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
        name = self.split.chunks[chunk].name
        try:
            if self._dataset is None:
                self._dataset = self._open_dataset()
            if self.remote:
                self._bring(chunk, Path(cast(str, self._dataset.input_dir.path)) / name)
            index = int(self.ends[chunk]) - self.split.chunks[chunk].rows
            loaded = self._dataset[ChunkedIndex(index=index, chunk_index=chunk)]
        except UserError:
            raise
        except Exception as error:  # each store has exceptions of its own
            raise UserError(f"{self.source}/{name} cannot be read: {error}") from error
        self._chunks[chunk] = loaded
        if len(self._chunks) > OPEN_CHUNKS:
            self._chunks.popitem(last=False)
        return loaded

    def _open_dataset(self) -> litdata.StreamingDataset:
        with tempfile.TemporaryDirectory() as folder:
            if self.remote:
                _download(self.source, INDEX, folder)
            return litdata.StreamingDataset(
                self.source,
                cache_dir=None if self.cache is None else str(self.cache),
                item_loader=self._loader,
                max_cache_size=CACHE_SHARE,
                index_path=folder if self.remote else None,
            )

    def _bring(self, number: int, path: Path) -> None:
        """See to it that a chunk of a remote set is in the cache and right, so that litdata has nothing to fetch.

        litdata's own fetching knows neither a bound of this kind nor the SHA-256, and fails in a thread of its own.
        """
        if number in self._loader.verified and path.is_file():
            return
        chunk = self.split.chunks[number]
        url = f"{self.source}/{chunk.name}"

        downloader = self._downloader = self._downloader or _downloader(self.source, str(path.parent))

        def get() -> None:
            try:
                if not path.is_file():
                    content = downloader.download_bytes(url, 0, chunk.bytes, str(path))
                    check(np.frombuffer(content, np.uint8), chunk)
                    beside = path.with_name(f"{path.name}.partial")
                    beside.write_bytes(content)
                    beside.replace(path)
                check(np.fromfile(path, np.uint8), chunk)
            except _Damaged:
                path.unlink(missing_ok=True)  # some of litdata's clients put it there themselves
                raise

        with FileLock(f"{path}.fetch"):  # the other processes of this machine want the same chunks
            attempts(url, get)
        self._loader.verified.add(number)


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
            try:
                check(content, chunk)
            except _Damaged as error:
                raise UserError(f"{chunk_filepath} {error}") from error
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
