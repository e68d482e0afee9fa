"""Prepare one set on many machines: each encodes a share of the files, and a merge writes the set from all shares.

The merge decides what depends on the whole corpus: which documents are held out or exceed `max_documents`, and where
sequences and chunks begin. So the set equals the one that `prepare` writes, byte for byte. `prepare` also divides a
corpus of fewer documents than `val_every` inside of a document, which a merge cannot and refuses.

{root}/{source}-{hash of the settings}.parts-{count}/
    tokenizer.json                  trained by the first shard, if it is trained
    {shard}/
        part.json  tokenizer.json   settings, sizes and hashes; the tokenizer
        train.ids  train.documents  the numbers of all documents, and a record `DOCUMENT_DTYPE` of each
        val.ids    val.documents    the same for validation text, if the source has some
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from cod_lightning.data.config import SHARDED_SOURCES, DataConfig
from cod_lightning.data.corpora import open_corpus, texts_of_shard
from cod_lightning.data.encode import DOCUMENT_DTYPE, Encoded, Encoder, batches, encoder_pool, take_tokens
from cod_lightning.data.manifest import SPLITS, TOKENIZER, file_problems
from cod_lightning.data.prepare import (
    PreparationProgress,
    build_folder,
    build_set,
    check_settings,
    checked_set,
    is_complete,
    prepared_folder,
    set_identity,
    tokenizer_for,
    val_limit,
    write_set,
)
from cod_lightning.data.tokenizers import DocumentTokenizer, load_tokenizer, trained_bpe
from cod_lightning.data.workers import available_cores
from cod_lightning.errors import UserError
from cod_lightning.files import locked, write_atomic
from cod_lightning.typed_json import read_json

PART = "part.json"
PART_FORMAT = 2
"""Increase when the files of a part change; the merge then rejects older parts as prepared with other settings."""
READ_DOCUMENTS = 2**12
"""Records of documents that the merge reads at a time."""
READ_NUMBERS = 2**22
"""Numbers that the merge reads at a time, plus at most one document: 8 MB of 16-bit ids."""


@dataclass(frozen=True)
class Stream:
    """The two files of one split of a part: how many documents and numbers they hold, and the SHA-256 of each."""

    documents: int
    numbers: int
    sha256: list[str]


@dataclass(frozen=True)
class Part:
    """The content of `part.json`. Parts of one merge differ only in `streams`."""

    settings: dict[str, Any]
    tokenizer: dict[str, Any]
    """SHA-256 of its JSON, `pad_id` and `eos_id`."""
    dtype: str
    streams: dict[str, Stream]


def parts_folder(config: DataConfig, count: int) -> Path:
    """Return the folder of the parts of `count` shards, beside the set."""
    folder = prepared_folder(config)
    return folder.with_name(f"{folder.name}.parts-{count}")


# --- a shard ----------------------------------------------------------------------------------------------------------


def prepare_shard(config: DataConfig, index: int, count: int) -> Path:
    """Encode share `index` (from 0) of `count` of the files; return the part's folder, or that of a complete set.

    The part appears under its name when it is finished; a complete one is not written again. Shards are independent,
    except that the first one to run trains a `bpe` tokenizer while the others wait for it.

    Raises:
        UserError: as `prepare`, or the source does not consist of files.
    """
    check_settings(config)
    if config.source not in SHARDED_SOURCES:
        raise UserError(
            f"data.source={config.source} does not consist of files that shards could divide: prepare it without "
            f"shard= (sources with shards: {', '.join(SHARDED_SOURCES)})"
        )
    folder = prepared_folder(config)
    if is_complete(folder):
        return checked_set(config, folder)
    settings = _settings(config)

    def is_complete_part(part: Path) -> bool:
        record = _read_part(part)
        return record is not None and record.settings == settings and not _damage(part, record)

    part = parts_folder(config, count) / str(index)
    build_folder(part, is_complete_part, partial(_prepare_part, config, settings, index, count))
    return part


def _prepare_part(
    config: DataConfig, settings: dict[str, Any], index: int, count: int, part: Path, report: PreparationProgress
) -> None:
    report.stage("preparing the tokenizer")
    tokenizer = _shared_tokenizer(config, part.parent)
    encoder = Encoder(tokenizer, config.row_layout, config.seq_len)
    texts = texts_of_shard(config, index, count)
    streams = {}
    with encoder_pool(encoder, config.workers or available_cores()) as encode_all:
        for split, documents in texts.items():
            # Without validation text, documents beyond `max_documents` may still be held out for validation.
            bounded = split == "train" and "val" in texts
            encoded = encode_all(batches(islice(documents(), config.max_documents if bounded else None)))
            if split == "val":
                encoded = take_tokens(encoded, val_limit(config))
            streams[split] = _write_stream(part, split, report.watch(split, encoded))
    ids = {"sha256": tokenizer.sha256, "pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id}
    record = Part(settings, ids, encoder.dtype.name, streams)
    (part / TOKENIZER).write_text(tokenizer.json, "utf-8")
    (part / PART).write_text(json.dumps(asdict(record), indent=1) + "\n", "utf-8")
    total = sum(stream.documents for stream in streams.values())
    report.done(f"{total:,} documents of shard {index}/{count}")


def _settings(config: DataConfig) -> dict[str, Any]:
    """Return the settings in which parts must agree, as JSON returns them."""
    return json.loads(json.dumps({"part": PART_FORMAT, **set_identity(config)}))


def _shared_tokenizer(config: DataConfig, parts: Path) -> DocumentTokenizer:
    """Load the tokenizer; the first shard trains a `bpe`, under a lock, and saves it for the others."""
    if config.tokenizer != "bpe":
        return load_tokenizer(config.tokenizer)
    path = parts / TOKENIZER
    with locked(path.with_name(f"{path.name}.lock")):
        if not path.is_file():
            write_atomic(path, tokenizer_for(config, open_corpus(config)).json)
    return trained_bpe(path.read_text("utf-8"))


def _stream_paths(part: Path, split: str) -> tuple[Path, Path]:
    return part / f"{split}.documents", part / f"{split}.ids"


def _write_stream(part: Path, split: str, encoded: Iterable[Encoded]) -> Stream:
    hashes = [hashlib.sha256(), hashlib.sha256()]
    documents = numbers = 0
    paths = _stream_paths(part, split)
    with open(paths[0], "wb") as records, open(paths[1], "wb") as ids:
        for batch in encoded:
            documents += len(batch.documents)
            numbers += batch.ids.size
            for file, sha256, content in zip((records, ids), hashes, (batch.documents, batch.ids), strict=True):
                file.write(content.tobytes())
                sha256.update(content.tobytes())
    return Stream(documents, numbers, [sha256.hexdigest() for sha256 in hashes])


def _read_part(part: Path) -> Part | None:
    """Return the record of a part, or None if it cannot be read."""
    try:
        return read_json(part / PART, Part, "prepare its shard again")
    except UserError:
        return None


def _damage(part: Path, record: Part) -> list[str]:
    """Return a line for every file of a part that is missing, or has the wrong size or another SHA-256."""
    sizes: dict[Path, int | None] = {}
    hashes: dict[Path, str] = {}
    for split, stream in record.streams.items():
        documents, ids = paths = _stream_paths(part, split)
        sizes[documents] = stream.documents * DOCUMENT_DTYPE.itemsize
        sizes[ids] = stream.numbers * np.dtype(record.dtype).itemsize
        hashes |= zip(paths, stream.sha256, strict=True)
    return file_problems(sizes) or [
        f"{path}: its SHA-256 differs from {PART}" for path, sha256 in hashes.items() if _sha256(path) != sha256
    ]


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha256.update(block)
    return sha256.hexdigest()


# --- the merge --------------------------------------------------------------------------------------------------------


def merge_shards(config: DataConfig, count: int) -> Path:
    """Merge the parts of `count` shards into the prepared set, unless it is complete; return its folder.

    Memory holds a few blocks of documents, whatever the size of the set. The parts are removed afterwards.

    Raises:
        UserError: parts are missing, damaged or prepared with other settings, each of which is named; there are fewer
            documents than `val_every`, and no validation text; or as `prepare`.
    """
    folder = build_set(config, partial(_merge, config, count))
    shutil.rmtree(parts_folder(config, count), ignore_errors=True)
    return folder


def _merge(config: DataConfig, count: int, folder: Path, report: PreparationProgress) -> None:
    report.stage("verifying the parts")
    parts = [parts_folder(config, count) / str(index) for index in range(count)]
    records = _read_parts(config, parts)
    documents = sum(record.streams["train"].documents for record in records)
    if documents < config.val_every and "val" not in records[0].streams:
        raise UserError(
            f"{documents} documents are fewer than data.val_every={config.val_every}, so that none is held out for "
            "validation: prepare without shard=, or set data.val_files"
        )
    ids = records[0].tokenizer
    tokenizer = DocumentTokenizer((parts[0] / TOKENIZER).read_text("utf-8"), ids["pad_id"], ids["eos_id"])
    if tokenizer.sha256 != ids["sha256"]:
        raise UserError(f"{parts[0] / TOKENIZER} is damaged; {_remedy(parts[0])}")
    encoder = Encoder(tokenizer, config.row_layout, config.seq_len)
    write_set(config, encoder, {split: _documents(config, split, parts, records) for split in SPLITS}, folder, report)


def _read_parts(config: DataConfig, parts: list[Path]) -> list[Part]:
    """Return the record of every part.

    Raises:
        UserError: has a line for each part that is missing, damaged or prepared with other settings.
    """
    settings = _settings(config)
    records: list[Part] = []
    problems = []
    for index, part in enumerate(parts):
        shard = f"{index}/{len(parts)}"
        record = _read_part(part)
        if record is None:
            line = f"part {shard} is missing: run prepare with shard={shard}"
            problems.append("; ".join([line, *_parts_of_other_settings(config, part, settings)]))
            continue
        records.append(record)
        if record.settings != settings:
            problem = f"was prepared with other settings: {_differences(record.settings, settings)}"
        elif (record.tokenizer, record.dtype) != (records[0].tokenizer, records[0].dtype):
            problem = "was prepared with another tokenizer than the parts before it"
        elif damage := _damage(part, record):
            problem = f"is damaged: {', '.join(damage)}"
        else:
            continue
        problems.append(f"part {shard} {problem}; {_remedy(part)}")
    if problems:
        raise UserError("\n".join(problems))
    return records


def _remedy(part: Path) -> str:
    return f"remove {part} and prepare its shard again"


def _parts_of_other_settings(config: DataConfig, part: Path, settings: dict[str, Any]) -> Iterator[str]:
    """Describe the parts with the same number that were prepared with other settings."""
    for other in sorted(Path(config.root).glob(f"{config.source}-*{part.parent.suffix}/{part.name}")):
        record = _read_part(other)
        if record is not None:
            yield f"{other} was prepared with other settings: {_differences(record.settings, settings)}"


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Name the settings in which two sets differ, with both values if they are short."""

    def flat(settings: dict[str, Any]) -> dict[str, str]:
        return {key: json.dumps(value) for key, value in {**settings, **settings.get("text", {})}.items()}

    their, our = flat(theirs), flat(ours)
    lines = []
    for key in sorted({*their, *our} - {"text"}):
        actual, expected = their.get(key, "unset"), our.get(key, "unset")
        if actual != expected:
            short = len(actual + expected) < 80
            lines.append(f"{key} {actual} instead of {expected}" if short else f"another {key}")
    return ", ".join(lines)


def _documents(config: DataConfig, split: str, parts: list[Path], records: list[Part]) -> Iterator[Encoded]:
    """Yield the documents of a split, in the order of the corpus."""
    has_val = "val" in records[0].streams
    name = split if has_val else "train"
    blocks = chain.from_iterable(_blocks(part, name, record) for part, record in zip(parts, records, strict=True))
    if not has_val:
        blocks = _hold_out(blocks, config.val_every, split == "val")
    if split == "train":
        return _take_documents(blocks, config.max_documents)
    return take_tokens(blocks, val_limit(config))


def _hold_out(blocks: Iterable[Encoded], every: int, held_out: bool) -> Iterator[Encoded]:
    """Select the documents with a number (from 1) divisible by `every`, or all others."""
    number = 1
    for block in blocks:
        numbers = np.arange(number, number + len(block.documents))
        number += len(block.documents)
        yield block.select((numbers % every == 0) == held_out)


def _take_documents(blocks: Iterable[Encoded], limit: int | None) -> Iterator[Encoded]:
    """Yield the first `limit` documents; all for None."""
    for block in blocks:
        if limit is not None and len(block.documents) >= limit:
            yield block.select(np.arange(len(block.documents)) < limit)
            return
        yield block
        limit = None if limit is None else limit - len(block.documents)


def _blocks(part: Path, split: str, record: Part) -> Iterator[Encoded]:
    """Read one split of a part, a block of documents at a time."""
    documents_path, ids_path = _stream_paths(part, split)
    with open(documents_path, "rb") as records, open(ids_path, "rb") as numbers:
        while len(read := np.fromfile(records, DOCUMENT_DTYPE, READ_DOCUMENTS)):
            block = np.cumsum(read["numbers"], dtype=np.int64) // READ_NUMBERS
            for documents in np.split(read, np.flatnonzero(np.diff(block)) + 1):
                ids = np.fromfile(numbers, record.dtype, int(documents["numbers"].sum(dtype=np.int64)))
                yield Encoded(ids, documents)
