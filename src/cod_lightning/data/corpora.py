"""Corpora: documents in a fixed order, for training and for validation."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, TypeAlias

from cod_lightning.data.config import FILE_SOURCES, TEXT_FIELD, UTF_8, DataConfig, patterns
from cod_lightning.data.debian12 import CORPUS
from cod_lightning.data.documentation import docs, docs_versions
from cod_lightning.data.hub import require_hub
from cod_lightning.data.instructions import DRAWN_RECIPE, PROMPT_RECIPE, Example, drawn
from cod_lightning.data.readers import SUFFIXES_HELP, example_of, is_readable, read_examples, read_file
from cod_lightning.errors import UserError, one_line

BORDER_CHARACTERS = 1000
"""Largest distance that a border inside a document moves back to a space."""


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

    Text is held out (`hold_out`), unless the source has validation text: `val_files`, and `c4`.
    `max_documents` limits the training documents only, so that runs on less text are validated on the same text.

    Raises:
        UserError: no files, or the hub cannot be used; while reading, as `read_file`, `read_examples`.
    """
    if config.source == "docs":
        documents = docs(workers)
        texts: Texts = {"train": lambda: iter(documents)}
    elif config.source == "drawn_instructions":
        texts = {"train": lambda: (example_of("drawn", record) for record in drawn())}
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
    read: Callable[[Path], Iterator[str]] = partial(read_examples, encoding=config.codec)
    if config.source == "files":
        read = partial(read_file, field=config.text_field, encoding=config.codec)

    def stream(files: list[Path]) -> Callable[[], Iterator[str]]:
        shard = files_of_share(files, index, count)
        return lambda: chain.from_iterable(map(read, shard))

    return {split: stream(files) for split, files in _split_files(config).items()}


def _split_files(config: DataConfig) -> dict[str, list[Path]]:
    """Return the files for training, and for validation if the settings name some.

    Raises:
        UserError: a file is both for training and for validation, also by a link.
    """
    files = {"train": find_files("data.files", config.files)}
    if config.val_files:
        files["val"] = find_files("data.val_files", config.val_files)
        held_out = {(stat.st_dev, stat.st_ino) for stat in map(Path.stat, files["val"])}
        for path in files["train"]:
            if ((stat := path.stat()).st_dev, stat.st_ino) in held_out:
                raise UserError(f"data.files and data.val_files both match {path}: exclude it from data.files")
    return files


def text_identity(config: DataConfig) -> dict[str, Any]:
    """Return the settings and facts that determine the text, without reading it.

    They are package versions for `docs`, and name, size and time of every file for `files`: a changed file leads to
    another set.
    """
    facts: dict[str, Any] = {"source": config.source, "max_documents": config.max_documents}
    if config.source == "docs":
        facts["versions"] = docs_versions()
    elif config.source in FILE_SOURCES:
        for split, files in _split_files(config).items():
            facts["files" if split == "train" else "val_files"] = [stamp(path) for path in files]
        # Only other values than the default ones count, so that sets from before these fields keep their names.
        if config.text_field != TEXT_FIELD:
            facts["text_field"] = config.text_field
        if config.codec != UTF_8:
            facts["encoding"] = config.codec
    if config.row_layout == "instructions":
        facts["recipes"] = {"prompt": PROMPT_RECIPE, "drawn": DRAWN_RECIPE}
    if config.source != "c4" and not config.val_files:
        facts["val_every"] = config.val_every
    return facts


def stamp(path: Path) -> list[Any]:
    """Resolved name, size in bytes and time of change of a file."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def hold_out(documents: Callable[[], Iterator[str]], every: int) -> Corpus:
    """Split one stream: the documents numbered `every`, 2 `every`, ... (from 1) are for validation.

    If there are fewer documents than `every`, the last 1/`every` of their text is for validation.
    """
    find_start = cache(lambda: holdout_start(documents, every))

    def parts() -> Iterator[tuple[str, bool]]:
        place, end = find_start(), 0
        for number, text in enumerate(documents(), 1):
            start, end = end, end + len(text)
            if place is None:
                yield text, number % every == 0
            elif start < place < end:
                yield text[: place - start], False
                yield text[place - start :], True
            else:
                yield text, start >= place

    def select(held_out: bool) -> Iterator[str]:
        return (text for text, is_held_out in parts() if is_held_out is held_out)

    return Corpus(train=partial(select, False), val=partial(select, True))


def holdout_start(documents: Callable[[], Iterator[str]], every: int) -> int | None:
    """Return the number of characters before the last 1/`every` of fewer than `every` documents; None for more.

    The last part begins after a space or line break, if there is one at most `BORDER_CHARACTERS` before, and never
    inside an example of instructions.
    """
    sizes = [len(text) for text in islice(documents(), every)]
    if len(sizes) == every:
        return None
    place, start = sum(sizes) - max(sum(sizes) // every, 1), 0
    for text in documents():
        if place < start + len(text):
            if isinstance(text, Example):
                return start or len(text)
            space = max(text.rfind(mark, max(place - start - BORDER_CHARACTERS, 0), place - start) for mark in " \n")
            return start + space + 1 if space >= 0 else place
        start += len(text)
    return None


# --- files ------------------------------------------------------------------------------------------------------------


def files_of_share(files: list[Path], index: int, count: int) -> list[Path]:
    """Return share `index` (from 0) of `count`: consecutive files, about the same number of bytes in each."""
    sizes = [path.stat().st_size for path in files]
    total = max(sum(sizes), 1)
    # A file belongs to the share that contains its middle.
    middles = ((2 * end - size) * count // (2 * total) for size, end in zip(sizes, accumulate(sizes), strict=True))
    return [path for path, middle in zip(files, middles, strict=True) if min(middle, count - 1) == index]


def find_files(field: str, value: Any) -> list[Path]:
    """Return the files that the globs of `field` match, sorted, each once and under its first name.

    The path of an existing file is no glob, nor are the leading folders of a path if they exist and it matches nothing.

    Raises:
        UserError: a glob matches nothing, or a file that `is_readable` does not know.
    """
    files: set[Path] = set()
    for pattern in patterns(value):
        names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        names = names or glob.glob(escape_folders(pattern), recursive=True)
        matches = {path for path in map(Path, names) if path.is_file()}
        if not matches:
            if os.path.isdir(pattern):
                raise UserError(
                    f"{field}: {pattern!r} is a folder: name its files, as in {pattern.rstrip('/')}/*.jsonl"
                )
            where = "" if os.path.isabs(pattern) else f" in {os.getcwd()}, to which it is relative"
            how = "; `python -m cod_lightning.data.debian12 --help` says how to build it" * (Path(pattern) == CORPUS)
            raise UserError(f"{field}: no file matches {pattern!r}{where}{how}")
        files |= matches
    for path in sorted(files):
        if not is_readable(path):
            raise UserError(f"{field}: {path} is not one of {SUFFIXES_HELP}")
    first = {path.resolve(): path for path in sorted(files, reverse=True)}  # links, and folder/../folder
    return sorted(first.values())


def escape_folders(pattern: str) -> str:
    """Return a glob that takes the longest leading folder that exists literally, such as "[2024] dump" of a path."""
    for folder in Path(pattern).parents:
        if folder.is_dir() and str(folder) != ".":
            return str(Path(glob.escape(str(folder)), Path(pattern).relative_to(folder)))
    return pattern


# --- c4 ---------------------------------------------------------------------------------------------------------------


def _c4(index: int, count: int) -> Texts:
    instead = "Read local files with data=files data.files='c4-train.*.json.gz'."
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"data.source=c4 needs the package datasets: pip install 'cod_lightning[hf]'. {instead}")
    require_hub("data.source=c4", instead)

    def stream(split: str) -> Iterator[str]:
        try:
            records = importlib.import_module("datasets").load_dataset("allenai/c4", "en", split=split, streaming=True)
            if count > 1:
                shares = min(count, records.num_shards)  # files; datasets cannot make more shares than that
                records = records.shard(shares, index, contiguous=True) if index < shares else ()
            for record in records:
                if record["text"] and not record["text"].isspace():
                    yield record["text"]
        except Exception as error:  # of requests, httpx, fsspec, datasets
            raise UserError(
                f"data.source=c4: cannot read the hub: {one_line(error)}; run again, or split with shard=K/N"
            ) from error

    return {"train": partial(stream, "train"), "val": partial(stream, "validation")}
