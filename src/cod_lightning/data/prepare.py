"""From text to a prepared set: tokenize, lay out in rows, write litdata chunks, describe them in a manifest.

{root}/{source}-{hash of the settings}/
    manifest.json  tokenizer.json
    train/  index.json  chunk-0-0.bin  chunk-0-1.bin ...
    val/    index.json  chunk-0-0.bin ...
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cod_lightning.data.config import DataConfig, problems
from cod_lightning.data.corpora import identity, open_corpus
from cod_lightning.data.instructions import Example
from cod_lightning.data.manifest import (
    MANIFEST,
    TOKENIZER,
    Chunk,
    Manifest,
    Source,
    Split,
    TokenizerRecord,
    damage,
    format_of,
    read_manifest,
    width_of,
)
from cod_lightning.data.tokenizer import DocumentTokenizer, load_tokenizer, train_bpe
from cod_lightning.errors import UserError

CHUNK_TOKENS = 2**23
"""Tokens per chunk, rounded down to whole rows: 16 MB of 16-bit ids, one object to fetch from a store."""
BATCH_CHARACTERS = 2**18
"""Text that one worker gets at a time: about 60,000 tokens, 0.1 s of work."""
PREPARED_VAL_TOKENS = 10_000_000
"""So much validation is kept even if `val_tokens` is less, so that lowering it does not prepare the set anew."""


def prepare(config: DataConfig, *, progress: bool = True) -> Path:
    """Make the prepared set that `config` describes, unless it exists and is whole; return its folder.

    Rows are the same whatever the number of `workers`. The set appears under its name only when it is finished, so
    that one interrupted at any point leaves nothing that passes for a set; of several processes that ask at once, one
    makes it and the others wait. `progress` reports on stderr: a bar on a terminal, one line at the end elsewhere.

    Raises:
        UserError: Bad settings, text or tokenizer that cannot be read, too little text for a row of each split, or a
            disk that cannot be written.
    """
    found = problems(config)
    if config.folder is not None:
        found.append(f"data.folder={config.folder!r} names a set that is prepared already: leave it out to prepare one")
    if found:
        raise UserError("\n".join(found))
    folder = prepared_folder(config)
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not is_whole(folder):
                _make_set(config, folder, progress)
    except OSError as error:  # a full disk, a folder that may not be written
        raise UserError(f"{folder}: the prepared set cannot be written ({error}); nothing of it is kept") from error
    return folder


def _make_set(config: DataConfig, folder: Path, progress: bool) -> None:
    """Write the set beside its place and rename it; the caller holds the lock."""
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(leftover)  # whoever made it held the lock, so it is dead
    partial_folder = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial_folder.mkdir()
    try:
        _write_set(config, partial_folder, folder, progress)
        if folder.exists():
            shutil.rmtree(folder)  # damaged, as it is not whole
        partial_folder.rename(folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def prepared_folder(config: DataConfig) -> Path:
    """Return where the set that `config` describes is kept: it follows from the settings that decide its rows.

    Raises:
        UserError: `data.files` match nothing, or the tokenizer's folder cannot be read.
    """
    settings = {
        "format": format_of(config.row_layout),
        "text": identity(config),
        "tokenizer": _tokenizer_identity(config),
        "rows": [config.row_layout, config.seq_len],
        "val_tokens": max(config.val_tokens, PREPARED_VAL_TOKENS),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Path(config.root) / f"{config.source}-{digest[:12]}"


def _tokenizer_identity(config: DataConfig) -> list[str | int]:
    if config.tokenizer == "bpe":
        return ["bpe", config.vocab_size]
    if Path(config.tokenizer).is_dir():
        return ["folder", load_tokenizer(config.tokenizer).sha256]
    return ["hub", config.tokenizer]


def is_whole(folder: Path) -> bool:
    """Return whether `folder` holds a finished set with all its files, judged by their sizes.

    Raises:
        UserError: The set was made by a newer version, which this one must not overwrite.
    """
    return (folder / MANIFEST).is_file() and not damage(folder, read_manifest(folder))


def check_against(config: DataConfig, manifest: Manifest, where: str) -> None:
    """Compare the set at `where` with the settings that decide what its rows are.

    Raises:
        UserError: Made with another tokenizer, layout or row length; names every difference and both values.
    """
    differences = []
    if config.row_layout != manifest.layout:
        # Which rows are instructions is a matter of the source.
        key = "source" if "instructions" in (config.row_layout, manifest.layout) else "layout"
        differences.append(f"data.{key}={getattr(config, key)!r}, but the set has {manifest.layout!r}")
    if config.seq_len != manifest.seq_len:
        differences.append(f"data.seq_len={config.seq_len}, but the set has {manifest.seq_len}")
    record = manifest.tokenizer
    if config.tokenizer != record.name:
        # The same tokenizer may be reached by another name: a folder is compared by content.
        path = Path(config.tokenizer) / TOKENIZER
        if not (path.is_file() and load_tokenizer(config.tokenizer).sha256 == record.sha256):
            differences.append(f"data.tokenizer={config.tokenizer!r}, but the set has {record.name!r}")
    elif record.requested is not None and config.vocab_size != record.requested:
        differences.append(f"data.vocab_size={config.vocab_size}, but the set has {record.requested}")
    if differences:
        raise UserError(f"{where} was prepared with other settings: {'; '.join(differences)}")


def _write_set(config: DataConfig, partial_folder: Path, folder: Path, progress: bool) -> None:
    workers = config.workers or _cores()
    with _Report(progress) as report:
        report.stage("gathering text")
        corpus = open_corpus(config, workers)
        report.stage("training the tokenizer" if config.tokenizer == "bpe" else "loading the tokenizer")
        if next(corpus.train(), None) is None:
            raise UserError(f"data.source={config.source}: the corpus has no training documents")
        if config.tokenizer == "bpe":
            tokenizer = train_bpe(corpus.train(), config.vocab_size)
        else:
            tokenizer = load_tokenizer(config.tokenizer)
        encoder = Encoder(tokenizer, config.row_layout, config.seq_len)
        text = _TextRecord()
        with _pool(encoder, workers) as encode_all:
            splits = {}
            for name, limit in (("train", None), ("val", max(config.val_tokens, PREPARED_VAL_TOKENS))):
                encoded = text.record(name, _until(encode_all(_batches(getattr(corpus, name)())), limit))
                splits[name] = _write_split(partial_folder / name, report.watch(name, encoded), encoder)
        for name, split in splits.items():
            if not split.rows:
                raise UserError(
                    f"data.source={config.source}: {text.documents[name]} documents do not fill one {name} row of "
                    f"data.seq_len={config.seq_len} tokens{_ADVICE[name]}"
                )
        manifest = Manifest(
            format=format_of(encoder.layout),
            tokenizer=TokenizerRecord(
                name=config.tokenizer,
                sha256=tokenizer.sha256,
                vocab_size=tokenizer.vocab_size,
                pad_id=tokenizer.pad_id,
                eos_id=tokenizer.eos_id,
                requested=config.vocab_size if config.tokenizer == "bpe" else None,
            ),
            source=Source(config.source, text.sha256.hexdigest(), text.documents),
            layout=encoder.layout,
            seq_len=config.seq_len,
            dtype=encoder.dtype.name,
            **splits,
        )
        (partial_folder / TOKENIZER).write_text(tokenizer.json, "utf-8")
        (partial_folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
        line = f"prepared {folder}: {manifest.train.rows:,} training and {manifest.val.rows:,} validation rows"
        if encoder.layout == "instructions":
            left_out = sum(text.documents.values()) - manifest.train.rows - manifest.val.rows
            line += f" ({left_out:,} examples left out, whose prompts take all of data.seq_len={config.seq_len})"
        report.done(line)


_ADVICE = {"train": "", "val": ": give more text, a smaller data.val_every, or data.val_files"}


# --- text -> ids, in other processes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """What a worker needs to turn documents into rows."""

    tokenizer: DocumentTokenizer
    layout: str
    seq_len: int

    @property
    def width(self) -> int:
        return width_of(self.layout, self.seq_len)

    @property
    def dtype(self) -> np.dtype:
        numbers = max(self.tokenizer.vocab_size, self.seq_len if self.layout == "instructions" else 0)
        return np.dtype(np.uint16 if numbers <= 2**16 else np.uint32)

    def __call__(self, documents: list[str]) -> Encoded:
        """Encode `documents` to a flat run of numbers.

        `packed`: each document and its EOS, one after the other. `document`: one row of `seq_len` ids each, padded at
        the end; one that is too long is cut and keeps its EOS as the last id, as the published runs had it.
        `instructions`: likewise one row for each `Example`, of the prompt, the answer and EOS, but one that is too long
        loses its EOS, as the answer does not end there, and one without room for a token of the answer is left out.
        Behind the ids stands the length of the prompt. Prompt and answer are encoded apart: no token is of both.
        """
        if self.layout == "instructions":
            return self.rows(*self.examples(documents))
        encoded = self.tokenizer.encode(documents)
        if self.layout == "packed":
            flat = np.fromiter((id for ids in encoded for id in ids), self.dtype, sum(map(len, encoded)))
            return Encoded(flat, tokens=flat.size, max_id=int(flat.max()))
        last = self.seq_len - 1
        return self.rows([ids if len(ids) <= last else [*ids[:last], self.tokenizer.eos_id] for ids in encoded])

    def examples(self, documents: list[str]) -> tuple[list[list[int]], list[int]]:
        """The ids of each example that has room for a token of its answer, and the length of its prompt."""
        parts = [cast(Example, document).parts for document in documents]
        prompts = [ids[:-1] for ids in self.tokenizer.encode([prompt for prompt, _ in parts])]
        answers = self.tokenizer.encode([answer for _, answer in parts])
        kept = [(p, a) for p, a in zip(prompts, answers, strict=True) if len(p) < self.seq_len]
        return [[*prompt, *answer][: self.seq_len] for prompt, answer in kept], [len(prompt) for prompt, _ in kept]

    def rows(self, encoded: list[list[int]], prompts: list[int] | None = None) -> Encoded:
        """One row each of at most `seq_len` ids, padded; behind it a number of `prompts`."""
        rows = np.full((len(encoded), self.width), self.tokenizer.pad_id, self.dtype)
        tokens = max_id = 0
        for row, ids in zip(rows, encoded, strict=True):
            row[: len(ids)] = ids
            tokens += len(ids)
            max_id = max(max_id, *ids)
        if prompts is not None:
            rows[:, -1] = prompts
        return Encoded(rows.reshape(-1), tokens, max_id)


@dataclass(frozen=True)
class Encoded:
    """Flat rows of a batch of documents, how many of their ids are not pad, and the largest that is not pad."""

    ids: np.ndarray
    tokens: int
    max_id: int


Batch: TypeAlias = tuple[list[str], Encoded]
"""Documents and what they are encoded to."""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents to about `BATCH_CHARACTERS`; the grouping follows from the text alone."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _until(batches: Iterable[Batch], tokens: int | None) -> Iterator[Batch]:
    """The leading batches, to and including the one that reaches `tokens`; all without a limit."""
    read = 0
    for documents, encoded in batches:
        yield documents, encoded
        read += encoded.tokens
        if tokens is not None and read >= tokens:
            return


@contextmanager
def _pool(encoder: Encoder, workers: int) -> Generator[Callable[[Iterable[list[str]]], Iterator[Batch]], None, None]:
    """Give a function that encodes batches of documents, in order, in `workers` processes."""
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker, also when the worker is this process
    try:
        if workers == 1:
            yield lambda batches: ((documents, encoder(documents)) for documents in batches)
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, context, _start_worker, (encoder,)) as executor:
                yield partial(_ordered_map, executor, 4 * workers)
    finally:
        if threads is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = threads


def _ordered_map(executor: ProcessPoolExecutor, ahead: int, batches: Iterable[list[str]]) -> Iterator[Batch]:
    """Like `executor.map`, but takes from `batches` only `ahead` more than were given out: text may be endless."""
    pending: deque = deque()
    try:
        for documents in batches:
            pending.append((documents, executor.submit(_encode_in_worker, documents)))
            if len(pending) >= ahead:
                documents, future = pending.popleft()
                yield documents, future.result()
        while pending:
            documents, future = pending.popleft()
            yield documents, future.result()
    finally:
        for _, future in pending:
            future.cancel()


_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    # An executor's workers outlive a parent that is killed, waiting for work for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode_in_worker(documents: list[str]) -> Encoded:
    return _encoder(documents)


# --- ids -> chunks ----------------------------------------------------------------------------------------------------


def _write_split(folder: Path, encoded: Iterable[Encoded], encoder: Encoder) -> Split:
    """Cut the ids to rows and write them to litdata chunks; a tail that does not fill a row is dropped."""
    width = encoder.width
    chunk_tokens = max(1, CHUNK_TOKENS // width) * width
    writer = _ChunkWriter(folder, chunk_tokens, width)
    waiting: list[np.ndarray] = []
    size = tokens = max_id = 0
    for batch in encoded:
        tokens, max_id = tokens + batch.tokens, max(max_id, batch.max_id)
        waiting.append(batch.ids)
        size += batch.ids.size
        if size >= chunk_tokens:
            ids = np.concatenate(waiting)
            full = size - size % chunk_tokens
            for chunk in ids[:full].reshape(-1, chunk_tokens):
                writer.write(chunk)
            waiting, size = [ids[full:]], size - full
    tail = size % width  # 0 but in `packed`: the others come in whole rows
    if size > tail:
        writer.write(np.concatenate(waiting)[: size - tail])
    chunks = writer.close()
    return Split(sum(chunk.rows for chunk in chunks), tokens - tail, max_id, chunks)


class _ChunkWriter:
    """Writes runs of whole rows, each as one chunk that litdata's TokensLoader reads in rows of `width`."""

    def __init__(self, folder: Path, chunk_tokens: int, width: int) -> None:
        from litdata.streaming.item_loader import TokensLoader
        from litdata.streaming.writer import BinaryWriter

        self.writer = BinaryWriter(str(folder), chunk_size=chunk_tokens, item_loader=TokensLoader(block_size=width))
        # litdata would number the chunks by the distributed rank, and wait for the other ranks to write theirs.
        self.writer._rank = 0
        self.width = width
        self.rows: list[int] = []
        self.chunks: list[Chunk] = []

    def write(self, ids: np.ndarray) -> None:
        path = self.writer.add_item(len(self.rows), ids)
        self.rows.append(ids.size // self.width)
        if path is not None:  # the chunk before: litdata writes one when the next has come
            self._written(path)

    def close(self) -> tuple[Chunk, ...]:
        for path in self.writer.done():
            self._written(path)
        self.writer._merge_no_wait()
        return tuple(self.chunks)

    def _written(self, path: str) -> None:
        self.chunks.append(_describe(Path(path), self.rows[len(self.chunks)]))


def _describe(path: Path, rows: int) -> Chunk:
    content = path.read_bytes()
    return Chunk(path.name, rows, len(content), hashlib.sha256(content).hexdigest())


# --- what was read, and how far we are --------------------------------------------------------------------------------


class _TextRecord:
    """Counts and hashes the documents that are used, which with several workers are fewer than those that are read."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.documents: dict[str, int] = {}

    def record(self, split: str, batches: Iterable[Batch]) -> Iterator[Encoded]:
        self.documents[split] = 0
        for documents, encoded in batches:
            self.documents[split] += len(documents)
            for document in documents:
                self.sha256.update(document.encode() + b"\0")
            yield encoded


class _Report:
    """Progress on stderr: a live line on a terminal, and one line at the end; nothing if not `enabled`."""

    def __init__(self, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled)
        self.progress = Progress(
            BarColumn(bar_width=20),  # pulses: how much text a stream holds is known at its end
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not (enabled and self.console.is_terminal),
        )
        self.task = self.progress.add_task("", total=None)

    def __enter__(self) -> _Report:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def stage(self, description: str) -> None:
        self.progress.update(self.task, description=description)

    def watch(self, split: str, encoded: Iterable[Encoded]) -> Iterator[Encoded]:
        tokens = 0
        for batch in encoded:
            tokens += batch.tokens
            self.stage(f"tokenizing, {split}: {tokens / 1e6:,.1f}M tokens")
            yield batch

    def done(self, line: str) -> None:
        elapsed = self.progress.tasks[self.task].elapsed or 0.0
        self.console.print(f"{line} in {elapsed:.1f} s", highlight=False, soft_wrap=True)
