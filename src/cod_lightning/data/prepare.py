"""From text to a prepared set: tokenize, lay out in rows, write litdata chunks, describe them in a manifest.

{root}/{source}-{hash of the settings}/
    manifest.json  tokenizer.json
    train/  index.json  chunk-0-0.bin  chunk-0-1.bin ...
    val/    index.json  chunk-0-0.bin ...
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cod_lightning.data.config import DataConfig, problems
from cod_lightning.data.corpora import Corpus, identity, open_corpus
from cod_lightning.data.encode import Encoded, Encoder, batches, cores, pool, until
from cod_lightning.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Chunk,
    Manifest,
    Source,
    Split,
    TokenizerRecord,
    damage,
    format_of,
    read_manifest,
)
from cod_lightning.data.tokenizers import DocumentTokenizer, load_tokenizer, train_bpe
from cod_lightning.errors import UserError

CHUNK_TOKENS = 2**23
"""Tokens per chunk, rounded down to whole rows: 16 MB of 16-bit ids, one object to fetch from a store."""
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
    check_settings(config)
    folder = prepared_folder(config)
    if not is_whole(folder):
        make_folder(folder, is_whole, lambda partial_folder: _make_set(config, partial_folder, folder, progress))
    check_text(config, read_manifest(folder).source.sha256, str(folder))
    return folder


def check_settings(config: DataConfig) -> None:
    """Check the settings of a set that is to be made.

    Raises:
        UserError: Bad settings, or they name a set that is there already.
    """
    found = problems(config)
    if config.folder is not None:
        found.append(f"data.folder={config.folder!r} names a set that is prepared already: leave it out to prepare one")
    if found:
        raise UserError("\n".join(found))


def make_folder(folder: Path, is_done: Callable[[Path], bool], make: Callable[[Path], None]) -> None:
    """Let `make` write a folder beside the place of `folder`, under a lock, and rename it; nothing if it is done.

    Raises:
        UserError: The disk cannot be written; or what `make` raises. Neither leaves anything but the lock's file.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if is_done(folder):
                return
            for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
                shutil.rmtree(leftover)  # whoever made it held the lock, so it is dead
            partial_folder = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
            partial_folder.mkdir()
            try:
                make(partial_folder)
                if folder.exists():
                    shutil.rmtree(folder)  # damaged, as it is not done
                partial_folder.rename(folder)
            finally:
                shutil.rmtree(partial_folder, ignore_errors=True)
    except OSError as error:  # a full disk, a folder that may not be written
        raise UserError(f"{folder} cannot be written ({error}); nothing of it is kept") from error


def prepared_folder(config: DataConfig) -> Path:
    """Return where the set that `config` describes is kept: it follows from `set_settings`.

    Raises:
        UserError: As `set_settings`.
    """
    digest = hashlib.sha256(json.dumps(set_settings(config), sort_keys=True).encode()).hexdigest()
    return Path(config.root) / f"{config.source}-{digest[:12]}"


def set_settings(config: DataConfig) -> dict[str, Any]:
    """Return the settings and facts that decide the rows of a set.

    Raises:
        UserError: `data.files` match nothing, or the tokenizer's folder cannot be read.
    """
    return {
        "format": format_of(config.row_layout),
        "text": identity(config),
        "tokenizer": _tokenizer_identity(config),
        "rows": [config.row_layout, config.seq_len],
        "val_tokens": val_limit(config),
    }


def val_limit(config: DataConfig) -> int:
    """Return how many validation tokens are prepared, a batch of documents more or less."""
    return max(config.val_tokens, PREPARED_VAL_TOKENS)


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
    check_text(config, manifest.source.sha256, where)


def check_text(config: DataConfig, sha256: str, where: str) -> None:
    """Compare the SHA-256 of the documents with `data.sha256`, if that is set.

    Raises:
        UserError: They differ.
    """
    if config.sha256 not in (None, sha256):
        raise UserError(
            f"data.sha256={config.sha256[:16]}..., but {where} has {sha256[:16]}...: give the corpus that results are "
            "compared on, or pass data.sha256=null for another one"
        )


def _make_set(config: DataConfig, partial_folder: Path, folder: Path, progress: bool) -> None:
    workers = config.workers or cores()
    with Report(progress) as report:
        report.stage("gathering text")
        corpus = open_corpus(config, workers)
        report.stage("training the tokenizer" if config.tokenizer == "bpe" else "loading the tokenizer")
        encoder = Encoder(tokenizer_for(config, corpus), config.row_layout, config.seq_len)
        with pool(encoder, workers) as encode_all:
            train = encode_all(batches(corpus.train()))
            val = until(encode_all(batches(corpus.val())), val_limit(config))
            write_set(config, encoder, {"train": train, "val": val}, partial_folder, folder, report)


def tokenizer_for(config: DataConfig, corpus: Corpus) -> DocumentTokenizer:
    """Train the tokenizer on the training text, or load it.

    Raises:
        UserError: There is no training text; or as `load_tokenizer`.
    """
    if next(corpus.train(), None) is None:
        raise UserError(f"data.source={config.source}: the corpus has no training documents")
    if config.tokenizer == "bpe":
        return train_bpe(corpus.train(), config.vocab_size)
    return load_tokenizer(config.tokenizer)


def write_set(
    config: DataConfig,
    encoder: Encoder,
    encoded: Mapping[str, Iterable[Encoded]],
    partial_folder: Path,
    folder: Path,
    report: Report,
) -> None:
    """Write chunks, tokenizer and manifest of the documents `encoded` of each split into `partial_folder`.

    `folder` is where the set will stand: for the last line of the report.

    Raises:
        UserError: A split has too little text for a row.
    """
    text = _TextRecord()
    splits = {
        name: _write_split(partial_folder / name, report.watch(name, text.record(name, encoded[name])), encoder)
        for name in SPLITS
    }
    for name, split in splits.items():
        if not split.rows:
            raise UserError(
                f"data.source={config.source}: {text.documents[name]} documents do not fill one {name} row of "
                f"data.seq_len={config.seq_len} tokens{_ADVICE[name]}"
            )
    check_text(config, text.sha256.hexdigest(), "the text")
    tokenizer = encoder.tokenizer
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

    def record(self, split: str, encoded: Iterable[Encoded]) -> Iterator[Encoded]:
        self.documents[split] = 0
        for batch in encoded:
            self.documents[split] += len(batch.documents)
            self.sha256.update(batch.documents["sha256"].tobytes())
            yield batch


class Report:
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

    def __enter__(self) -> Report:
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
            self.stage(f"{split}: {tokens / 1e6:,.1f}M tokens")
            yield batch

    def done(self, line: str) -> None:
        elapsed = self.progress.tasks[self.task].elapsed or 0.0
        self.console.print(f"{line} in {elapsed:.1f} s", highlight=False, soft_wrap=True)
