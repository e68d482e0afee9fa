"""Chunks of sequences: files in litdata's format, written with its writer and downloaded with its clients.

Reading is ours, because litdata's StreamingDataset gives one sequence at a time, does not compare checksums, and
downloads in a thread whose failures end in a time-out without a reason. Any litdata reader can read the files.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from cod_lightning.data.encode import Encoded
from cod_lightning.data.manifest import INDEX, Chunk, Split
from cod_lightning.errors import UserError, one_line, plural

CHUNK_TOKENS = 2**23
"""Tokens per chunk, rounded down to whole sequences: 16 MB of 16-bit ids, one object in a store."""
REMEDY = "remove the set and prepare it again, or copy the file again"


def require_home() -> None:
    """Check that there is a home folder, without which litdata cannot be imported.

    Raises:
        UserError: HOME is not set, and the user has no account.
    """
    try:
        Path.home()
    except RuntimeError as error:
        raise UserError("HOME is not set, and this user has no account: set HOME to any folder, for litdata") from error


class ChunkWriter:
    """Writes one split into `folder`: chunks of sequences of `width` numbers, and litdata's index.json.

    For litdata a chunk holds one item, all its sequences; its TokensLoader splits them again.
    """

    def __init__(self, folder: Path, width: int) -> None:
        require_home()
        from litdata.streaming.item_loader import TokensLoader
        from litdata.streaming.writer import BinaryWriter

        class Writer(BinaryWriter):
            rank = 0  # litdata numbers chunks by the distributed rank; here every node writes the same names

        self.folder, self.width = folder, width
        self.chunk_tokens = max(1, CHUNK_TOKENS // width) * width
        self.writer = Writer(str(folder), chunk_size=self.chunk_tokens, item_loader=TokensLoader(block_size=width))
        self.buffer: list[np.ndarray] = []
        self.buffered = 0
        self.rows: list[int] = []
        self.chunks: list[Chunk] = []
        self.tokens = self.max_id = 0

    def write(self, encoded: Encoded) -> None:
        """Append documents; their numbers need not end with a sequence."""
        self.tokens += encoded.tokens
        self.max_id = max(self.max_id, encoded.max_id)
        self.buffer.append(encoded.ids)
        self.buffered += encoded.ids.size
        if self.buffered >= self.chunk_tokens:
            self._flush(self.buffered - self.buffered % self.chunk_tokens)

    def close(self) -> Split:
        """Write the rest and the index; drop a tail that does not fill a sequence, which only `packed` has."""
        rest = self.buffered % self.width
        if self.buffered > rest:
            self._flush(self.buffered - rest)
        for path in self.writer.done():
            self._describe(Path(path))
        if self.chunks:
            # The index of the only writer is the index of the split; litdata's `merge` would wait for other ranks.
            (self.folder / "0.index.json").rename(self.folder / INDEX)
        return Split(sum(self.rows), self.tokens - rest, self.max_id, tuple(self.chunks))

    def _flush(self, size: int) -> None:
        """Write the first `size` numbers of the buffer, whole sequences, as chunks."""
        ids = np.concatenate(self.buffer)
        for start in range(0, size, self.chunk_tokens):
            chunk = ids[start : min(start + self.chunk_tokens, size)]
            path = self.writer.add_item(len(self.rows), chunk)
            self.rows.append(chunk.size // self.width)
            if path is not None:  # of the previous chunk: litdata writes one when the next arrives
                self._describe(Path(path))
        self.buffer, self.buffered = [ids[size:]], ids.size - size

    def _describe(self, path: Path) -> None:
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        self.chunks.append(Chunk(path.name, self.rows[len(self.chunks)], len(content), sha256))


class DamagedChunkError(Exception):
    """The bytes of a chunk differ from the manifest."""


def check_chunk(content: bytes | memoryview, chunk: Chunk) -> None:
    """Compare the bytes of a chunk with the manifest.

    Raises:
        DamagedChunkError: the size or the SHA-256 differs.
    """
    if len(content) != chunk.bytes:
        raise DamagedChunkError(f"is damaged: {len(content):,} bytes instead of {chunk.bytes:,}; {REMEDY}")
    if hashlib.sha256(content).hexdigest() != chunk.sha256:
        raise DamagedChunkError(f"is damaged: its SHA-256 differs from the manifest; {REMEDY}")


def chunk_rows(content: np.ndarray, chunk: Chunk, width: int, dtype: np.dtype) -> np.ndarray:
    """View the bytes of a chunk, which start with a header, as its sequences: [rows, width] of type `dtype`."""
    return content[len(content) - chunk.rows * width * dtype.itemsize :].view(dtype).reshape(chunk.rows, width)


# --- stores -----------------------------------------------------------------------------------------------------------

ATTEMPTS = 4
"""Attempts to download a file."""
TIMEOUT = 30.0
"""Seconds to connect, and to wait for the next byte, before an attempt at an `s3://` URL fails."""
PAUSE = 1.0
"""Seconds between the first two attempts; doubles for each further one."""
CLIENTS = {"gs": "google-cloud-storage", "azure": "azure-storage-blob", "hf": "huggingface_hub"}
"""Packages with litdata's clients that are not installed with it, by the scheme of the URL."""
TRANSIENT = (408, 429)
"""HTTP statuses from 400 to 499 that a retry may cure."""
CACHE_SHARE = 0.75
"""Share that the cached chunks of a split may have of the free space plus what they take already."""


def is_remote(source: str) -> bool:
    """Return whether `source` is a URL for litdata (`s3://`, `gs://`, ..., `local:`) rather than a local folder."""
    return re.match(r"[a-z][a-z0-9]+:", source) is not None


class Store:
    """Downloads files below a URL with litdata's client, retrying a bounded number of times."""

    def __init__(self, url: str) -> None:
        require_home()
        from litdata.streaming.downloader import get_downloader

        self.url = url.rstrip("/")
        options = {}
        if self.url.startswith("s3://"):
            from botocore.config import Config

            # One request per attempt; litdata's default retries a thousand times.
            retries = {"total_max_attempts": 1}
            options["config"] = Config(connect_timeout=TIMEOUT, read_timeout=TIMEOUT, retries=retries)
        try:
            self.downloader = get_downloader(self.url, "", [], options)
        except ModuleNotFoundError as error:
            package = CLIENTS.get(self.url.partition(":")[0])
            remedy = f"pip install {package}" if package else one_line(error)
            raise UserError(f"{self.url} needs a package to be downloaded: {remedy}") from error

    def read(self, name: str, chunk: Chunk | None = None) -> bytes:
        """Return the content of a file; each attempt compares that of a `chunk` with the manifest.

        Raises:
            UserError: the last attempt failed, or one with an error that a retry cannot cure; names the URL, the reason
                and the number of attempts.
        """
        url = f"{self.url}/{name}"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                content = self._download(url, name, chunk)
                if chunk is not None:
                    check_chunk(content, chunk)
                return content
            except Exception as error:  # every store has its own exceptions
                if attempt == ATTEMPTS or _is_final(error):
                    damaged = isinstance(error, DamagedChunkError)
                    reason = str(error) if damaged else f"cannot be read: {one_line(error)}"
                    raise UserError(f"{url} {reason} ({plural(attempt, 'attempt')})") from error
            time.sleep(PAUSE * 2 ** (attempt - 1))
        raise AssertionError

    def _download(self, url: str, name: str, chunk: Chunk | None) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            if chunk is not None:
                return self.downloader.download_bytes(url, 0, chunk.bytes, str(path))
            if url.startswith("s3://"):
                # Its `download_file` uses a client that supports no http:// and retries for minutes.
                with open(path, "wb") as file:
                    self.downloader.download_fileobj(url, file)
            else:
                self.downloader.download_file(url, str(path))
            return path.read_bytes()


def _is_final(error: Exception) -> bool:
    from botocore.exceptions import ClientError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        return 400 <= status < 500 and status not in TRANSIENT
    return isinstance(error, FileNotFoundError)


def evict_chunks(folder: Path, needed: int) -> None:
    """Delete the oldest chunks of a cache until it fits, with `needed` more bytes, into `CACHE_SHARE` of the disk.

    Other processes may delete them at the same time.
    """
    chunks = {}
    for path in folder.glob("*.bin"):
        with suppress(FileNotFoundError):
            chunks[path] = path.stat()
    used = sum(stat.st_size for stat in chunks.values())
    limit = CACHE_SHARE * (used + shutil.disk_usage(folder).free) - needed
    for path in sorted(chunks, key=lambda path: chunks[path].st_mtime_ns):
        if used <= limit:
            return
        path.unlink(missing_ok=True)
        used -= chunks[path].st_size
