"""One prepared set from many machines: each encodes a share of the files, and a merge lays all of it out in rows.

What depends on the whole corpus is left to the merge: which documents are held out or beyond `max_documents`, and where
rows and chunks begin. So the set is, byte for byte, the one that `prepare` makes.

{root}/{source}-{hash of the settings}.parts-{count}/
    tokenizer.json                  trained by the shard that comes first, if it is to be trained
    {shard}/
        part.json  tokenizer.json   settings, sizes and hashes; the tokenizer that was used
        train.ids  train.documents  the numbers of all documents, and a record `DOCUMENT` of each
        val.ids    val.documents    likewise, where validation text comes by itself
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from cod_lightning.data.config import SHARDED_SOURCES, DataConfig
from cod_lightning.data.corpora import open_corpus, texts_of_shard
from cod_lightning.data.encode import DOCUMENT, Encoded, Encoder, batches, cores, joined, pool, until
from cod_lightning.data.manifest import SPLITS, TOKENIZER
from cod_lightning.data.prepare import (
    Report,
    check_settings,
    is_whole,
    make_folder,
    prepared_folder,
    set_settings,
    tokenizer_for,
    val_limit,
    write_set,
)
from cod_lightning.data.tokenizers import DocumentTokenizer, load_tokenizer, trained_bpe
from cod_lightning.errors import UserError

PART = "part.json"
PART_FORMAT = 1
"""Raise when the files of a part change: parts of another version are then named as made with other settings."""
READ_DOCUMENTS = 2**12
"""Records of documents that the merge reads at a time."""
READ_NUMBERS = 2**22
"""So many numbers and those of one document more are the most that the merge reads at a time: 8 MB of 16-bit ids."""


@dataclass(frozen=True)
class Stream:
    """The two files of one stream of a part: how many documents and numbers they hold, and their SHA-256."""

    documents: int
    numbers: int
    sha256: list[str]


@dataclass(frozen=True)
class Part:
    """The content of `part.json`. Parts that are merged agree in all but `streams`."""

    settings: dict[str, Any]
    tokenizer: dict[str, Any]
    """SHA-256 of its JSON, `pad_id` and `eos_id`."""
    dtype: str
    streams: dict[str, Stream]


def shard_of(text: str) -> tuple[int, int]:
    """Parse "K/N", shard K of N, counted from 0.

    Raises:
        UserError: Something else, or K is not below N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(
            f"shard={text}: must be K/N, where N shards are numbered from 0, such as shard=0/4 to shard=3/4"
        )
    return int(match[1]), int(match[2])


def count_of(text: str) -> int:
    """Parse the number of shards to merge.

    Raises:
        UserError: Not a number, or 0.
    """
    if not re.fullmatch(r"\d+", text) or not int(text):
        raise UserError(f"merge={text}: must be the number of shards, such as merge=4 after shard=0/4 to shard=3/4")
    return int(text)


def parts_folder(config: DataConfig, count: int) -> Path:
    """Return where `count` shards keep their parts: beside the set, under its name.

    Raises:
        UserError: As `set_settings`.
    """
    folder = prepared_folder(config)
    return folder.with_name(f"{folder.name}.parts-{count}")


# --- a shard ----------------------------------------------------------------------------------------------------------


def prepare_shard(config: DataConfig, index: int, count: int, *, progress: bool = True) -> Path:
    """Encode the share `index` (from 0) of `count` of the files; return the part's folder, or the set's if it is whole.

    The part appears under its name only when it is finished; one that is there and whole is kept. A shard needs nothing
    of the others but a tokenizer that is to be trained: the first trains it for all, and the others wait for it.

    Raises:
        UserError: As `prepare`, or the source is not made of files.
    """
    check_settings(config)
    if config.source not in SHARDED_SOURCES:
        raise UserError(
            f"data.source={config.source} is not made of files that shards could share: prepare it without shard= "
            f"(with shards: {', '.join(SHARDED_SOURCES)})"
        )
    folder = prepared_folder(config)
    if is_whole(folder):
        return folder
    parts = parts_folder(config, count)
    part = parts / str(index)

    def is_done(part: Path) -> bool:
        record = _read_part(part)
        return record is not None and record.settings == _settings(config) and not _damage(part, record)

    if not is_done(part):
        make_folder(part, is_done, lambda partial: _make_part(config, index, count, partial, part, progress))
    return part


def _make_part(config: DataConfig, index: int, count: int, partial: Path, part: Path, progress: bool) -> None:
    workers = config.workers or cores()
    with Report(progress) as report:
        report.stage("training the tokenizer" if config.tokenizer == "bpe" else "loading the tokenizer")
        tokenizer = _shared_tokenizer(config, part.parent)
        encoder = Encoder(tokenizer, config.row_layout, config.seq_len)
        texts = texts_of_shard(config, index, count)
        streams = {}
        with pool(encoder, workers) as encode_all:
            for name, documents in texts.items():
                if name == "val":
                    encoded = encode_all(batches(documents()))
                    # Batches of the whole corpus begin elsewhere: the last of them ends within one more of these.
                    encoded = chain(until(encoded, val_limit(config)), islice(encoded, 1))
                else:
                    # Those beyond `max_documents` may be wanted for validation if that has no text of its own.
                    most = config.max_documents if "val" in texts else None
                    encoded = encode_all(batches(islice(documents(), most)))
                streams[name] = _write_stream(partial / name, report.watch(name, encoded))
        ids = {"sha256": tokenizer.sha256, "pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id}
        record = Part(_settings(config), ids, encoder.dtype.name, streams)
        (partial / TOKENIZER).write_text(tokenizer.json, "utf-8")
        (partial / PART).write_text(json.dumps(asdict(record), indent=1) + "\n", "utf-8")
        documents = sum(stream.documents for stream in streams.values())
        report.done(f"prepared {part}: {documents:,} documents of shard {index}/{count}")


def _settings(config: DataConfig) -> dict[str, Any]:
    """What parts have to agree in, as JSON gives it back."""
    return json.loads(json.dumps({"part": PART_FORMAT, **set_settings(config)}))


def _shared_tokenizer(config: DataConfig, parts: Path) -> DocumentTokenizer:
    """Load the tokenizer; one that is to be trained is trained once, under a lock, and kept with the parts."""
    if config.tokenizer != "bpe":
        return load_tokenizer(config.tokenizer)
    path = parts / TOKENIZER
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            beside = path.with_name(f"{TOKENIZER}.partial")
            beside.write_text(tokenizer_for(config, open_corpus(config)).json, "utf-8")
            beside.rename(path)
    return trained_bpe(path.read_text("utf-8"))


def _stream_paths(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".documents"), path.with_suffix(".ids")


def _write_stream(path: Path, encoded: Iterable[Encoded]) -> Stream:
    hashes = [hashlib.sha256(), hashlib.sha256()]
    documents = numbers = 0
    paths = _stream_paths(path)
    with open(paths[0], "wb") as records, open(paths[1], "wb") as ids:
        for batch in encoded:
            documents += len(batch.documents)
            numbers += batch.ids.size
            for file, sha256, content in zip((records, ids), hashes, (batch.documents, batch.ids), strict=True):
                file.write(content.tobytes())
                sha256.update(content.tobytes())
    return Stream(documents, numbers, [sha256.hexdigest() for sha256 in hashes])


def _read_part(part: Path) -> Part | None:
    """The record of a part, None where there is none that can be read."""
    try:
        record = json.loads((part / PART).read_text("utf-8"))
        streams = {name: Stream(**stream) for name, stream in record.pop("streams").items()}
        return Part(streams=streams, **record)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _damage(part: Path, record: Part) -> list[str]:
    """What is wrong with the files of a part, judged by their sizes."""
    found = []
    for name, stream in record.streams.items():
        sizes = stream.documents * DOCUMENT.itemsize, stream.numbers * np.dtype(record.dtype).itemsize
        for path, size in zip(_stream_paths(part / name), sizes, strict=True):
            if not path.is_file():
                found.append(f"{path.name} is missing")
            elif path.stat().st_size != size:
                found.append(f"{path.name} has {path.stat().st_size:,} bytes instead of {size:,}")
    return found


# --- the merge --------------------------------------------------------------------------------------------------------


def merge_shards(config: DataConfig, count: int, *, progress: bool = True) -> Path:
    """Make the prepared set of the parts of `count` shards, unless it is whole; return its folder.

    Needs memory for some blocks of documents, whatever the size of the set. When the set stands, the parts are removed.

    Raises:
        UserError: Parts are missing, damaged or made with other settings, each of which is named; or as `prepare`.
    """
    check_settings(config)
    folder = prepared_folder(config)
    if not is_whole(folder):
        make_folder(folder, is_whole, lambda partial: _merge(config, count, partial, folder, progress))
    shutil.rmtree(parts_folder(config, count), ignore_errors=True)
    return folder


def _merge(config: DataConfig, count: int, partial: Path, folder: Path, progress: bool) -> None:
    parts = parts_folder(config, count)
    records = {index: _read_part(parts / str(index)) for index in range(count)}
    found = {index: record for index, record in records.items() if record is not None}
    problems = [_missing(config, parts, index, count) for index in range(count) if index not in found]
    settings = _settings(config)
    first = min(found, default=0)
    for index, record in found.items():
        if record.settings != settings:
            wrong = f"was made with other settings: {_differences(record.settings, settings)}"
        elif (record.tokenizer, record.dtype) != (found[first].tokenizer, found[first].dtype):
            wrong = f"was made with another tokenizer than part {first}/{count}"
        elif damage := _damage(parts / str(index), record):
            wrong = f"is damaged: {', '.join(damage)}"
        else:
            continue
        problems.append(f"part {index}/{count} {wrong}; {_again(parts / str(index))}")
    if problems:
        raise UserError("\n".join(problems))
    ids = {name: found[first].tokenizer[name] for name in ("pad_id", "eos_id")}
    tokenizer = DocumentTokenizer((parts / str(first) / TOKENIZER).read_text("utf-8"), **ids)
    if tokenizer.sha256 != found[first].tokenizer["sha256"]:
        raise UserError(f"{parts / str(first) / TOKENIZER} is damaged; {_again(parts / str(first))}")
    encoder = Encoder(tokenizer, config.row_layout, config.seq_len)
    with Report(progress) as report:
        encoded = {split: _documents(config, split, parts, found) for split in SPLITS}
        write_set(config, encoder, encoded, partial, folder, report)


def _again(part: Path) -> str:
    return f"remove {part} and prepare its shard again"


def _missing(config: DataConfig, parts: Path, index: int, count: int) -> str:
    """Say that a part is missing, and where there are parts of the same number that were made with other settings."""
    line = f"part {index}/{count} is missing: prepare with shard={index}/{count} makes it"
    for other in sorted(parts.parent.glob(f"{config.source}-*.parts-{count}/{index}")):
        record = _read_part(other)
        if record is not None:
            line += f"; {other} was made with other settings: {_differences(record.settings, _settings(config))}"
    return line


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Name the settings in which two sets differ, with both values where they are short."""
    named = []
    for flat in ({**record, **record.get("text", {})} for record in (theirs, ours)):
        named.append({key: json.dumps(value) for key, value in flat.items() if key != "text"})
    keys = [key for key in sorted({*named[0], *named[1]}) if named[0].get(key) != named[1].get(key)]
    return ", ".join(
        f"{key} {theirs} instead of {ours}" if len(theirs + ours) < 80 else f"other {key}"
        for key in keys
        for theirs, ours in [(named[0].get(key, "none"), named[1].get(key, "none"))]
    )


def _documents(config: DataConfig, split: str, parts: Path, found: dict[int, Part]) -> Iterator[Encoded]:
    """The documents of a split, in the order of the corpus, and those of validation in the batches of `prepare`.

    Raises:
        UserError: A file is not what `part.json` says.
    """
    has_val = all("val" in part.streams for part in found.values())
    stream = split if has_val else "train"
    blocks = chain.from_iterable(_blocks(parts / str(index), stream, found[index]) for index in sorted(found))
    if not has_val:
        blocks = _numbered(blocks, config.val_every, split == "val")
    if split == "train":
        return _first(blocks, config.max_documents)
    each = chain.from_iterable(block.each() for block in blocks)
    # How much is validated on ends with a batch, so the batches have to be the same.
    return until(map(joined, batches(each, lambda one: int(one.documents["characters"][0]))), val_limit(config))


def _numbered(blocks: Iterable[Encoded], every: int, held: bool) -> Iterator[Encoded]:
    """Those of the documents whose number, from 1, is divisible by `every`; the others unless `held`."""
    number = 1
    for block in blocks:
        numbers = np.arange(number, number + len(block.documents))
        number += len(block.documents)
        yield block.where((numbers % every == 0) == held)


def _first(blocks: Iterable[Encoded], most: int | None) -> Iterator[Encoded]:
    """The leading `most` documents; all if None."""
    for block in blocks:
        if most is not None and len(block.documents) >= most:
            yield block.where(np.arange(len(block.documents)) < most)
            return
        yield block
        most = None if most is None else most - len(block.documents)


def _blocks(part: Path, name: str, record: Part) -> Iterator[Encoded]:
    """The documents of one stream of a part, read from start to end a block at a time."""
    hashes = [hashlib.sha256(), hashlib.sha256()]
    paths = _stream_paths(part / name)
    with open(paths[0], "rb") as records, open(paths[1], "rb") as numbers:
        while len(read := np.fromfile(records, DOCUMENT, READ_DOCUMENTS)):
            hashes[0].update(read.tobytes())
            block = np.cumsum(read["numbers"], dtype=np.int64) // READ_NUMBERS
            for documents in np.split(read, np.flatnonzero(np.diff(block)) + 1):
                ids = np.fromfile(numbers, record.dtype, int(documents["numbers"].sum(dtype=np.int64)))
                hashes[1].update(ids.tobytes())
                yield Encoded(ids, documents)
    for path, sha256, expected in zip(paths, hashes, record.streams[name].sha256, strict=True):
        if sha256.hexdigest() != expected:
            raise UserError(f"{path} is damaged: its SHA-256 is not that of {PART}; {_again(part)}")
