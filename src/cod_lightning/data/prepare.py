"""Prepare a set: tokenize text, lay it out in sequences, write chunks, and describe them in a manifest.

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
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cod_lightning.data.chunks import ChunkWriter
from cod_lightning.data.config import DataConfig, data_errors
from cod_lightning.data.corpora import Corpus, open_corpus, stamp, text_identity
from cod_lightning.data.encode import Encoded, Encoder, batches, encoder_pool, take_tokens
from cod_lightning.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    Source,
    TokenizerRecord,
    find_damage,
    format_version,
    read_manifest,
)
from cod_lightning.data.tokenizers import DocumentTokenizer, load_tokenizer, train_bpe
from cod_lightning.data.workers import available_cores, require_main_guard
from cod_lightning.errors import UserError
from cod_lightning.files import check_writable, locked, new_folder

PREPARED_VAL_TOKENS = 10_000_000
"""Validation tokens to prepare even if `val_tokens` is smaller, so that a smaller value reuses the set."""
Build: TypeAlias = Callable[[Path, "PreparationProgress"], None]
"""Writes the files of a new folder."""


def prepare(config: DataConfig) -> Path:
    """Prepare the set that `config` describes, unless it is complete; return its folder.

    The sequences do not depend on `workers`. The set appears under its name when it is finished, so an interrupted one
    is never used; of several processes that prepare it at once, one does the work and the others wait. Progress is
    reported on stderr: a bar on a terminal, and one line at the end.

    Raises:
        UserError: bad settings, text or tokenizer that cannot be read, text that differs from `data.sha256`, too little
            text for a sequence of each split, or a disk that cannot be written.
    """
    return build_set(config, partial(_prepare, config))


def build_set(config: DataConfig, build: Build) -> Path:
    """Let `build` write the set that `config` describes, unless it is complete; return its folder.

    Raises:
        UserError: as `prepare`.
    """
    check_settings(config)
    folder = prepared_folder(config)
    build_folder(folder, is_complete, build)
    return checked_set(config, folder)


def check_settings(config: DataConfig) -> None:
    """Raise a UserError for bad settings, or settings that name an existing set."""
    errors = data_errors(config)
    if config.folder is not None:
        errors.append(f"data.folder={config.folder!r} names a set that is already prepared; omit it to prepare one")
    if errors:
        raise UserError("\n".join(errors))


def build_folder(folder: Path, is_complete: Callable[[Path], bool], build: Build) -> None:
    """Unless `folder` is complete, let `build` write a temporary folder, under a lock, and rename it to `folder`.

    Raises:
        UserError: the disk cannot be written, or this is a worker of an unguarded script; or as `build`. No file
            remains.
    """
    if is_complete(folder):
        return
    require_main_guard()
    check_writable(folder.parent, "data.root=")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        real = Path(os.path.realpath(folder))
        with locked(real.with_name(f"{real.name}.lock")):
            if is_complete(folder):
                return
            for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
                shutil.rmtree(leftover)  # its process held the lock, so it is dead
            if folder.exists():
                shutil.rmtree(folder)  # damaged
            with new_folder(folder) as new, PreparationProgress(folder) as report:
                build(new, report)
    except OSError as error:  # a file instead of the folder, a folder without write permission
        raise UserError(f"{folder} cannot be written ({error})") from error


# --- identity of a set ------------------------------------------------------------------------------------------------


def prepared_folder(config: DataConfig) -> Path:
    """Return the folder of the set that `config` describes; its name is a hash of `set_identity`."""
    digest = hashlib.sha256(json.dumps(set_identity(config), sort_keys=True).encode()).hexdigest()
    return Path(config.root) / f"{config.source}-{digest[:12]}"


def set_identity(config: DataConfig) -> dict[str, Any]:
    """Return the settings and facts that determine the sequences of a set.

    Raises:
        UserError: `data.files` match nothing, or the tokenizer's folder cannot be read.
    """
    if config.tokenizer == "bpe":
        tokenizer: list[str | int] = ["bpe", config.vocab_size]
    elif Path(config.tokenizer).is_dir():
        loaded = load_tokenizer(config.tokenizer)
        tokenizer = ["folder", loaded.sha256, *loaded.configured_ids]
    elif Path(config.tokenizer).is_file():  # a .gguf
        tokenizer = ["file", *stamp(Path(config.tokenizer))]
    else:
        tokenizer = ["hub", config.tokenizer]
    return {
        "format": format_version(config.row_layout),
        "text": text_identity(config),
        "tokenizer": tokenizer,
        "rows": [config.row_layout, config.seq_len],
        "val_tokens": val_limit(config),
    }


def val_limit(config: DataConfig) -> int:
    """Return the number of validation tokens to prepare; the last document may exceed it."""
    return max(config.val_tokens, PREPARED_VAL_TOKENS)


def is_complete(folder: Path) -> bool:
    """Return whether `folder` holds a finished set with all its files; chunks are judged by their sizes.

    Raises:
        UserError: as `Manifest.from_json`; the set of a newer version must not be overwritten.
    """
    return (folder / MANIFEST).is_file() and not find_damage(folder, read_manifest(folder))


def checked_set(config: DataConfig, folder: Path) -> Path:
    """Return the folder of a complete set; raise a UserError if its text differs from `data.sha256`."""
    check_sha256(config, read_manifest(folder).source.sha256, str(folder))
    return folder


def check_against(config: DataConfig, manifest: Manifest, source: str) -> None:
    """Compare the set at `source` with the settings that determine its sequences.

    Raises:
        UserError: another text, tokenizer, layout or length; names every difference and both values.
    """
    differences = []
    if config.row_layout != manifest.layout:
        # Instructions are a source and not a layout.
        key = "source" if "instructions" in (config.row_layout, manifest.layout) else "layout"
        differences.append(f"data.{key}={getattr(config, key)!r}, but the set has {manifest.layout!r}")
    elif config.source != manifest.source.name:
        differences.append(f"data.source={config.source!r}, but the set has {manifest.source.name!r}")
    if config.seq_len != manifest.seq_len:
        differences.append(f"data.seq_len={config.seq_len}, but the set has {manifest.seq_len}")
    record = manifest.tokenizer
    if (Path(config.tokenizer) / TOKENIZER).is_file():  # the same tokenizer may have another name
        ours = load_tokenizer(config.tokenizer)
        if ours.sha256 != record.sha256:
            differences.append(f"data.tokenizer={config.tokenizer!r} differs from that of the set, {record.name!r}")
        elif (ours.pad_id, ours.eos_id) != (record.pad_id, record.eos_id):
            differences.append(
                f"data.tokenizer={config.tokenizer!r} has pad {ours.pad_id} and EOS {ours.eos_id}, but the set has "
                f"{record.pad_id} and {record.eos_id}"
            )
    elif config.tokenizer != record.name:
        differences.append(f"data.tokenizer={config.tokenizer!r}, but the set has {record.name!r}")
    elif record.requested is not None and config.vocab_size != record.requested:
        differences.append(f"data.vocab_size={config.vocab_size}, but the set has {record.requested}")
    if differences:
        raise UserError(f"{source} was prepared with other settings: {'; '.join(differences)}")
    check_sha256(config, manifest.source.sha256, source)


def check_sha256(config: DataConfig, sha256: str, source: str) -> None:
    """Raise a UserError if `data.sha256` is set and is not the SHA-256 of the documents at `source`."""
    if config.sha256 not in (None, sha256):
        raise UserError(
            f"data.sha256={config.sha256[:16]}..., but {source} has {sha256[:16]}...: use the corpus that the results "
            "are compared on, or pass data.sha256=null for another one"
        )


# --- from text to chunks ----------------------------------------------------------------------------------------------


def _prepare(config: DataConfig, folder: Path, report: PreparationProgress) -> None:
    workers = config.workers or available_cores()
    report.stage("gathering text")
    corpus = open_corpus(config, workers)
    report.stage("preparing the tokenizer")
    encoder = Encoder(tokenizer_for(config, corpus), config.row_layout, config.seq_len)
    with encoder_pool(encoder, workers) as encode_all:
        train = encode_all(batches(corpus.train()))
        val = take_tokens(encode_all(batches(corpus.val())), val_limit(config))
        write_set(config, encoder, {"train": train, "val": val}, folder, report)


def tokenizer_for(config: DataConfig, corpus: Corpus) -> DocumentTokenizer:
    """Train the tokenizer on the training text, or load it.

    Raises:
        UserError: there is no training text; or as `load_tokenizer`.
    """
    if next(corpus.train(), None) is None:
        raise UserError(f"data.source={config.source}: the corpus has no training documents: give more text")
    if config.tokenizer == "bpe":
        return train_bpe(corpus.train(), config.vocab_size)
    return load_tokenizer(config.tokenizer)


def write_set(
    config: DataConfig,
    encoder: Encoder,
    encoded: Mapping[str, Iterable[Encoded]],
    folder: Path,
    report: PreparationProgress,
) -> None:
    """Write chunks, tokenizer and manifest of the `encoded` documents of each split into `folder`.

    Raises:
        UserError: a split has too little text for a sequence, or the text differs from `data.sha256`.
    """
    sha256, documents, splits, truncated = hashlib.sha256(), dict.fromkeys(SPLITS, 0), {}, 0
    for name in SPLITS:
        if name == "val" and config.val_files:  # without them, data.val_every divides the text
            sha256.update(b"val")
        writer = ChunkWriter(folder / name, encoder.width)
        for batch in report.watch(name, encoded[name]):
            truncated += encoder.count_truncated_answers(batch) if encoder.layout == "instructions" else 0
            documents[name] += len(batch.documents)
            sha256.update(batch.documents["sha256"].tobytes())
            writer.write(batch)
        splits[name] = writer.close()
        if not splits[name].rows:
            raise UserError(
                f"data.source={config.source}: {documents[name]} documents do not fill one {name} sequence of "
                f"data.seq_len={config.seq_len} tokens: give more text"
                + (", a smaller data.val_every, or data.val_files" if name == "val" else "")
            )
    check_sha256(config, sha256.hexdigest(), "the text")
    tokenizer = encoder.tokenizer
    manifest = Manifest(
        format=format_version(encoder.layout),
        tokenizer=TokenizerRecord(
            name=config.tokenizer,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            requested=config.vocab_size if config.tokenizer == "bpe" else None,
        ),
        source=Source(config.source, sha256.hexdigest(), documents),
        layout=encoder.layout,
        seq_len=config.seq_len,
        dtype=encoder.dtype.name,
        **splits,
    )
    (folder / TOKENIZER).write_text(tokenizer.json, "utf-8")
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    train, val = manifest.train.rows, manifest.val.rows
    line = f"{train:,} training and {val:,} validation sequences"
    if encoder.layout == "instructions":
        skipped = sum(documents.values()) - train - val
        line += f" ({skipped:,} examples skipped, whose prompts fill all of data.seq_len={config.seq_len}"
        line += f"; {truncated:,} answers cut there)"
    report.done(line)


class PreparationProgress(Progress):
    """Progress on stderr: a live line on a terminal, and one line at the end."""

    def __init__(self, folder: Path) -> None:
        console = Console(stderr=True, markup=False, emoji=False)
        super().__init__(
            BarColumn(bar_width=20),  # pulses: the length of a stream is known only at its end
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.folder = folder
        self.stream = self.add_task("", total=None)

    def stage(self, description: str) -> None:
        self.update(self.stream, description=description)

    def watch(self, split: str, encoded: Iterable[Encoded]) -> Iterator[Encoded]:
        tokens = 0
        for batch in encoded:
            tokens += batch.tokens
            self.stage(f"{split}: {tokens / 1e6:,.1f}M tokens")
            yield batch

    def done(self, line: str) -> None:
        elapsed = self.tasks[self.stream].elapsed or 0.0
        self.console.print(f"prepared {self.folder}: {line} in {elapsed:.1f} s", highlight=False, soft_wrap=True)
