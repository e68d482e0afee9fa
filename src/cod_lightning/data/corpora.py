"""Corpora: documents in a fixed order, for training and for validation."""

from __future__ import annotations

import codecs
import glob
import gzip
import importlib
import importlib.util
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedIOBase
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from cod_lightning.data.config import FILE_SOURCES, SOURCES, DataConfig, patterns
from cod_lightning.data.documentation import docs, docs_versions
from cod_lightning.data.hub import require_hub
from cod_lightning.data.instructions import DRAWN_RECIPE, PROMPT_RECIPE, Example, drawn, prompt_of
from cod_lightning.errors import UserError, nearest


@dataclass(frozen=True)
class Corpus:
    """Two streams of documents; each can be read repeatedly and is the same every time.

    Documents of an instruction source are of type `Example`.
    """

    train: Callable[[], Iterator[str]]
    val: Callable[[], Iterator[str]]


Texts: TypeAlias = dict[str, Callable[[], Iterator[str]]]
"""Streams of documents: `train`, and `val` unless validation text is held out of `train`."""


def open_corpus(config: DataConfig, workers: int = 1) -> Corpus:
    """Return the corpus that `config` names; `workers` processes gather `docs`.

    Every `val_every`-th document is held out, unless the source has validation text: `val_files`, and `c4`.
    `max_documents` limits the training documents only, so that runs on less text are validated on the same text.

    Raises:
        UserError: unknown source, no files, or the hub cannot be used; while reading, as `read_file`, `read_examples`.
    """
    if config.source == "docs":
        documents = docs(workers)
        texts: Texts = {"train": lambda: iter(documents)}
    elif config.source == "drawn_instructions":
        texts = {"train": lambda: (_example("drawn", record) for record in drawn())}
    else:
        texts = texts_of_shard(config, 0, 1)
    corpus = Corpus(**texts) if "val" in texts else hold_out(texts["train"], config.val_every)
    return Corpus(train=lambda: islice(corpus.train(), config.max_documents), val=corpus.val)


def texts_of_shard(config: DataConfig, index: int, count: int) -> Texts:
    """Return share `index` (from 0) of `count` of the files of a corpus; all shares in order are the whole corpus.

    Documents are neither held out nor limited here, because that depends on their number in the whole corpus. The
    source must be one of `SHARDED_SOURCES`. Raises as `open_corpus`.
    """
    if config.source == "c4":
        return _c4(index, count)
    if config.source not in FILE_SOURCES:
        raise UserError(f"data.source={config.source!r}: {nearest(config.source, SOURCES)}")
    read = read_file if config.source == "files" else read_examples

    def stream(files: list[Path]) -> Callable[[], Iterator[str]]:
        shard = share(files, index, count)
        return lambda: chain.from_iterable(map(read, shard))

    return {split: stream(files) for split, files in _split_files(config).items()}


def _split_files(config: DataConfig) -> dict[str, list[Path]]:
    """Return the files for training, and for validation if the settings name some."""
    files = {"train": find_files("data.files", config.files)}
    if config.val_files:
        files["val"] = find_files("data.val_files", config.val_files)
    return files


def identity(config: DataConfig) -> dict[str, Any]:
    """Return the settings and facts that determine the text, without reading it.

    They are package versions for `docs`, and name, size and time of every file for `files`: a changed file leads to
    another set.
    """
    facts: dict[str, Any] = {"source": config.source, "max_documents": config.max_documents}
    if config.source == "docs":
        facts["versions"] = docs_versions()
    elif config.source in FILE_SOURCES:
        for split, files in _split_files(config).items():
            facts["files" if split == "train" else "val_files"] = [_stamp(path) for path in files]
    if config.row_layout == "instructions":
        facts["recipes"] = {"prompt": PROMPT_RECIPE, "drawn": DRAWN_RECIPE}
    if config.source != "c4" and not config.val_files:
        facts["val_every"] = config.val_every
    return facts


def _stamp(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def hold_out(documents: Callable[[], Iterator[str]], every: int) -> Corpus:
    """Split one stream: the documents numbered `every`, 2 `every`, ... (from 1) are for validation."""

    def select(held_out: bool) -> Iterator[str]:
        return (text for number, text in enumerate(documents(), 1) if (number % every == 0) is held_out)

    return Corpus(train=partial(select, False), val=partial(select, True))


# --- files ------------------------------------------------------------------------------------------------------------

FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz")


def share(files: list[Path], index: int, count: int) -> list[Path]:
    """Return share `index` (from 0) of `count`: consecutive files, about the same number of bytes in each."""
    sizes = [path.stat().st_size for path in files]
    total = max(sum(sizes), 1)
    # A file belongs to the share that contains its middle.
    middles = ((2 * end - size) * count // (2 * total) for size, end in zip(sizes, accumulate(sizes), strict=True))
    return [path for path, middle in zip(files, middles, strict=True) if min(middle, count - 1) == index]


def find_files(field: str, value: Any) -> list[Path]:
    """Return the files that the globs of `field` match, sorted, each once.

    Raises:
        UserError: a glob matches nothing, or a file that is not one of `FILE_SUFFIXES`.
    """
    files: set[Path] = set()
    for pattern in patterns(value):
        names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        matches = {path for name in names if (path := Path(name)).is_file()}
        if not matches:
            where = "" if os.path.isabs(pattern) else f" in {os.getcwd()}, to which it is relative"
            raise UserError(f"{field}: no file matches {pattern!r}{where}")
        files |= matches
    for path in sorted(files):
        if not path.name.endswith(FILE_SUFFIXES):
            raise UserError(f"{field}: {path} is not one of {', '.join(FILE_SUFFIXES)}")
    return sorted(files)


def read_file(path: Path) -> Iterator[str]:
    """Yield the documents of one file: all of a `.txt`; the field `text` of each line of a `.jsonl` or `.json`.

    Skips documents that are empty or whitespace.

    Raises:
        UserError: names the file, and the line if there are lines: not readable, damaged gzip, not UTF-8, not JSON, or
            without `text`.
    """
    with _opened(path) as file:
        if path.name.endswith((".txt", ".txt.gz")):
            texts: Iterable[str] = [file.read().decode("utf-8-sig")]
        else:
            texts = (_string(location, record, "text") for location, record in _json_lines(path, file))
        for text in texts:
            if text and not text.isspace():
                yield text


def read_examples(path: Path) -> Iterator[Example]:
    """Yield the examples of a `.json` or `.jsonl` of instructions: one list of records, or one record per line.

    Raises:
        UserError: names the file, and the line or record: not readable, damaged gzip, not JSON, text, or without an
            instruction or an output.
    """
    if path.name.endswith((".txt", ".txt.gz")):
        raise UserError(f"data.source=instructions: {path} is not one of .jsonl, .json, .jsonl.gz, .json.gz")
    with _opened(path) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    if content.lstrip()[:1] == b"[":
        records = ((f"{path}, record {n}", record) for n, record in enumerate(_json(str(path), content), 1))
    else:
        records = _json_lines(path, content.splitlines(keepends=True))
    yield from (_example(location, record) for location, record in records)


def _example(location: str, record: Any) -> Example:
    instruction, output = _string(location, record, "instruction"), _string(location, record, "output")
    for name, text in (("instruction", instruction), ("output", output)):
        if not text or text.isspace():
            raise UserError(f'{location}: the field "{name}" is empty')
    return Example(prompt_of(instruction, _string(location, {"input": "", **record}, "input")), output)


@contextmanager
def _opened(path: Path) -> Generator[BufferedIOBase, None, None]:
    """Open a file, decompressed; errors while reading it name it."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield the location and the record of each line that is not blank."""
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            location = f"{path}, line {number}"
            yield location, _json(location, line)


def _json(location: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not JSON ({error})") from error


def _string(location: str, record: Any, name: str) -> str:
    text = record.get(name) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{location}: no string in the field "{name}"')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise UserError(f"{location}: not valid Unicode ({error})") from error
    return text


# --- c4 ---------------------------------------------------------------------------------------------------------------


def _c4(index: int, count: int) -> Texts:
    instead = "Read local files with data=files data.files='c4-train.*.json.gz'."
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"data.source=c4 needs the package datasets: pip install 'cod_lightning[hf]'. {instead}")
    require_hub("data.source=c4", instead)

    def stream(split: str) -> Iterator[str]:
        records = importlib.import_module("datasets").load_dataset("allenai/c4", "en", split=split, streaming=True)
        if count > 1:
            shares = min(count, records.num_shards)  # files; datasets cannot make more shares than that
            records = records.shard(shares, index, contiguous=True) if index < shares else ()
        for record in records:
            if record["text"] and not record["text"].isspace():
                yield record["text"]

    return {"train": partial(stream, "train"), "val": partial(stream, "validation")}
