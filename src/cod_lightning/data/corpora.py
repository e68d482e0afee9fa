"""Text: documents in a fixed order, for training and for validation."""

from __future__ import annotations

import ast
import codecs
import glob
import gzip
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing
import platform
import re
import string
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from io import BufferedIOBase
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Any, TypeAlias

from cod_lightning.data.config import FILE_SOURCES, SOURCES, DataConfig, patterns
from cod_lightning.data.hub import require_hub
from cod_lightning.data.instructions import DRAWN_RECIPE, PROMPT_RECIPE, Example, drawn, prompt_of
from cod_lightning.errors import UserError, nearest


@dataclass(frozen=True)
class Corpus:
    """Two streams of documents, each of which can be read again from its start and is the same every time.

    Those of a source of instructions are each an `Example`.
    """

    train: Callable[[], Iterator[str]]
    val: Callable[[], Iterator[str]]


def open_corpus(config: DataConfig, workers: int = 1) -> Corpus:
    """Return the corpus that `config` names; `workers` processes help to gather `docs`.

    Every `val_every`-th document is held out, except where validation text comes by itself: `val_files`, and `c4`.
    `max_documents` bounds the training documents only, so that runs on less text are validated on the same text.

    Raises:
        UserError: Unknown source, no files, or the hub cannot be used; while reading, as `read_file`, `read_examples`.
    """
    if config.source == "docs":
        documents = docs(workers)
        texts: Texts = {"train": lambda: iter(documents)}
    elif config.source == "drawn_instructions":
        texts = {"train": lambda: (_example("drawn", record) for record in drawn())}
    else:
        texts = texts_of_shard(config, 0, 1)
    corpus = Corpus(**texts) if "val" in texts else held_out(texts["train"], config.val_every)
    if config.max_documents is None:
        return corpus
    return Corpus(train=lambda: islice(corpus.train(), config.max_documents), val=corpus.val)


Texts: TypeAlias = dict[str, Callable[[], Iterator[str]]]
"""Streams of documents: `train`, and `val` unless that is to be held out of the other."""


def texts_of_shard(config: DataConfig, index: int, count: int) -> Texts:
    """Return the share `index` (from 0) of `count` of the files of a corpus: those of all shards in turn are all of it.

    Nothing is held out and nothing is bounded yet, as that takes the number of a document among all. The source has to
    be one of `SHARDED_SOURCES`.

    Raises:
        UserError: As `open_corpus`.
    """
    if config.source == "c4":
        return _c4(index, count)
    if config.source not in FILE_SOURCES:
        raise UserError(f"data.source={config.source!r}: {nearest(config.source, SOURCES)}")
    read = read_file if config.source == "files" else read_examples

    def stream(field: str, value: Any) -> Callable[[], Iterator[str]]:
        files = share(find_files(field, value), index, count)
        return lambda: (document for path in files for document in read(path))

    texts: Texts = {"train": stream("data.files", config.files)}
    if config.val_files:
        texts["val"] = stream("data.val_files", config.val_files)
    return texts


def identity(config: DataConfig) -> dict[str, Any]:
    """Return the settings and facts that decide the text, found without reading it.

    For `docs` these are the versions of the packages, for `files` the name, size and time of every file, so that a
    changed file makes another set.
    """
    facts: dict[str, Any] = {"source": config.source, "max_documents": config.max_documents}
    if config.source == "docs":
        facts["versions"] = {"python": platform.python_version(), "recipe": DOCS_RECIPE}
        for name in ("botocore", *DOCS_PACKAGES):
            if importlib.util.find_spec(name):
                facts["versions"][name] = importlib.metadata.version(name)
    elif config.source in FILE_SOURCES:
        facts["files"] = [_stamp(path) for path in find_files("data.files", config.files)]
        if config.val_files:
            facts["val_files"] = [_stamp(path) for path in find_files("data.val_files", config.val_files)]
    if config.row_layout == "instructions":
        facts["recipes"] = {"prompt": PROMPT_RECIPE, "drawn": DRAWN_RECIPE}
    if config.source != "c4" and not config.val_files:
        facts["val_every"] = config.val_every
    return facts


def _stamp(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def held_out(documents: Callable[[], Iterator[str]], every: int) -> Corpus:
    """Split one stream: the documents numbered `every`, 2 `every`, ... (from 1) are for validation."""

    def chosen(held: bool) -> Iterator[str]:
        return (text for number, text in enumerate(documents(), 1) if (number % every == 0) is held)

    return Corpus(train=partial(chosen, False), val=partial(chosen, True))


# --- files ------------------------------------------------------------------------------------------------------------

FILE_KINDS = (".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz")


def share(files: list[Path], index: int, count: int) -> list[Path]:
    """Return the share `index` (from 0) of `count`: files that follow each other, with about the same bytes for all."""
    sizes = [path.stat().st_size for path in files]
    total = max(sum(sizes), 1)
    # A file belongs to the share in which its middle lies.
    middles = ((2 * end - size) * count // (2 * total) for size, end in zip(sizes, accumulate(sizes), strict=True))
    return [path for path, middle in zip(files, middles, strict=True) if min(middle, count - 1) == index]


def find_files(field: str, value: Any) -> list[Path]:
    """Return the files that the globs of `field` match, sorted, each once.

    Raises:
        UserError: A glob matches nothing, or matches a file that is not one of `FILE_KINDS`.
    """
    found: set[Path] = set()
    for pattern in patterns(value):
        matches = [Path(name) for name in glob.glob(pattern, recursive=True)]
        files = {path for path in matches if path.is_file()}
        if not files:
            raise UserError(f"{field}: no file matches {pattern!r}")
        found |= files
    for path in sorted(found):
        if not path.name.endswith(FILE_KINDS):
            raise UserError(f"{field}: {path} is none of {', '.join(FILE_KINDS)}")
    return sorted(found)


def read_file(path: Path) -> Iterator[str]:
    """Yield the documents of one file: a `.txt` is one, a `.jsonl` or `.json` has one per line, in the field `text`.

    Documents that are empty or only blanks are left out.

    Raises:
        UserError: Names the file, and the line where there are lines: not readable, damaged gzip, not UTF-8, not JSON,
            or without `text`.
    """
    with _opened(path) as file:
        if path.name.endswith((".txt", ".txt.gz")):
            texts: Iterable[str] = [file.read().decode("utf-8-sig")]
        else:
            texts = (_string(where, record, "text") for where, record in _json_lines(path, file))
        for text in texts:
            if text and not text.isspace():
                yield text


def read_examples(path: Path) -> Iterator[Example]:
    """Yield the examples of a `.json` or `.jsonl` of instructions: one list of records, or one record per line.

    Raises:
        UserError: Names the file, and the line or record: not readable, damaged gzip, not JSON, text, or without an
            instruction or an output.
    """
    if path.name.endswith((".txt", ".txt.gz")):
        raise UserError(f"data.source=instructions: {path} is none of .jsonl, .json, .jsonl.gz, .json.gz")
    with _opened(path) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    if content.lstrip()[:1] == b"[":
        records = ((f"{path}, record {n}", record) for n, record in enumerate(_json(str(path), content), 1))
    else:
        records = _json_lines(path, content.splitlines(keepends=True))
    yield from (_example(where, record) for where, record in records)


def _example(where: str, record: Any) -> Example:
    instruction, output = _string(where, record, "instruction"), _string(where, record, "output")
    for name, text in (("instruction", instruction), ("output", output)):
        if not text or text.isspace():
            raise UserError(f'{where}: the field "{name}" is empty')
    return Example(prompt_of(instruction, _string(where, {"input": "", **record}, "input")), output)


@contextmanager
def _opened(path: Path) -> Generator[BufferedIOBase, None, None]:
    """The bytes of a file, unpacked; what goes wrong with them names it."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    """The record of each line that is not blank, and where it stands."""
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            where = f"{path}, line {number}"
            yield where, _json(where, line)


def _json(where: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error


def _string(where: str, record: Any, name: str) -> str:
    text = record.get(name) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where}: no string in the field "{name}"')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise UserError(f"{where}: not valid Unicode ({error})") from error
    return text


# --- c4 ---------------------------------------------------------------------------------------------------------------


def _c4(index: int, count: int) -> Texts:
    instead = "Files that are already here are read with data=files data.files='c4-train.*.json.gz'."
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"data.source=c4 needs the package datasets: pip install 'cod_lightning[hf]'. {instead}")
    require_hub("data.source=c4", instead)

    def stream(split: str) -> Iterator[str]:
        records = importlib.import_module("datasets").load_dataset("allenai/c4", "en", split=split, streaming=True)
        if count > 1:
            shares = min(count, records.num_shards)  # files; datasets refuses to make more shares than that
            records = records.shard(shares, index, contiguous=True) if index < shares else ()
        for record in records:
            if record["text"] and not record["text"].isspace():
                yield record["text"]

    return {"train": partial(stream, "train"), "val": partial(stream, "validation")}


# --- docs -------------------------------------------------------------------------------------------------------------

DOCS_PACKAGES = ("torch", "sympy", "networkx", "numpy", "torchmetrics", "lightning")
DOCS_RECIPE = 1
"""Raise when the code below yields other text from the same packages."""
DOCS_CHARACTERS = 20_000_000
DOCUMENT_CHARACTERS = (400, 1_600)
"""A document takes paragraphs until it has the larger number; a rest below the smaller is left out."""
PARAGRAPH_CHARACTERS = 120
"""Shorter ones are mostly labels and signatures."""
LETTERS = 0.87
"""Least share of letters (ASCII) and blanks; below are tables, formulas and code."""
_LETTERS = f"{string.ascii_letters} ".encode()
SHINGLE_WORDS = 5
SHINGLE_SAMPLE = 4
"""One word in so many (by its hash, so the choice is the same in a copy) starts a shingle that is remembered."""
DOCSTRING_SHARE = 0.4
"""Modules with less of their text in docstrings cost more time to parse than they give."""
_SKIPPED = {"test", "tests", "testing", "site-packages", "dist-packages", "idlelib", "lib2to3"}


def docs(workers: int = 1) -> list[str]:
    """Return the documentation that every installation carries: 10-20 MB of English prose in documents of paragraphs.

    It is the API documentation of botocore (latest version of each service) and the docstrings of the standard library
    and of `DOCS_PACKAGES`, parsed and never imported. Paragraphs mostly seen before are dropped. The text follows from
    the versions of Python and of these packages.
    """
    units = _docs_units()
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            paragraphs = list(pool.map(_unit_paragraphs, units, chunksize=16))
    else:
        paragraphs = [_unit_paragraphs(unit) for unit in units]
    is_new = NearDuplicates()
    documents: list[str] = []
    for unit in paragraphs:
        documents += join_paragraphs(paragraph for paragraph in unit if is_new(paragraph))
    return _bounded(documents, DOCS_CHARACTERS)


def _bounded(documents: list[str], characters: int) -> list[str]:
    """Leave out documents evenly, where there are more than `characters`, so that every source keeps its share."""
    total = sum(map(len, documents))
    if total <= characters:
        return documents
    kept: list[str] = []
    read = used = 0
    for document in documents:
        read += len(document)
        if used + len(document) <= characters * read / total:
            kept.append(document)
            used += len(document)
    return kept


def _docs_units() -> list[list[Path]]:
    """Groups of files, each the source of some documents: one service of botocore, or one folder of a package."""
    units: list[list[Path]] = []
    root = _package_root("botocore")
    if root:
        for service in sorted((root / "data").iterdir()):
            versions = sorted(service.glob("*/service-2.json*"))
            units += [versions[-1:]] if versions else []
    roots = [Path(sysconfig.get_path("stdlib")), *map(_package_root, DOCS_PACKAGES)]
    for root in filter(None, roots):
        modules = [path for path in sorted(root.rglob("*.py")) if not _is_test(path.relative_to(root))]
        units += [list(group) for _, group in groupby(modules, key=lambda path: path.parent)]
    return units


def _package_root(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _is_test(path: Path) -> bool:
    return any(part in _SKIPPED or part.startswith("test_") for part in path.parts)


def _unit_paragraphs(files: list[Path]) -> list[str]:
    extract = _docstrings if files[0].suffix == ".py" else _service_texts
    return [
        paragraph for path in files for text in extract(path) for paragraph in text.split("\n") if _prose(paragraph)
    ]


def _prose(paragraph: str) -> bool:
    if len(paragraph) < PARAGRAPH_CHARACTERS or ">>>" in paragraph:
        return False
    text = paragraph.encode()
    return len(text.translate(None, _LETTERS)) <= (1 - LETTERS) * len(text)


def _service_texts(path: Path) -> Iterator[str]:
    """The documentation strings of one service, paragraphs separated by line ends."""
    opened = gzip.open if path.suffix == ".gz" else open
    texts: list[str] = []

    def collect(node: dict[str, Any]) -> None:
        text = node.get("documentation")
        if isinstance(text, str) and len(text) >= PARAGRAPH_CHARACTERS:
            texts.append(text)

    with opened(path, "rb") as file:
        json.load(file, object_hook=collect)
    return map(html_text, dict.fromkeys(texts))


class _Text(HTMLParser):
    INLINE = frozenset({"a", "b", "code", "em", "i", "span", "strong", "sub", "sup", "u", "var"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        self.parts.append(" ".join(data.split("\n")))


def html_text(html: str) -> str:
    """Return the text of `html`: entities decoded, one line for each block (paragraph, list item, ...)."""
    if "<" in html or "&" in html:
        parser = _Text()
        parser.feed(html)
        parser.close()
        html = "".join(parser.parts)
    lines = (" ".join(line.split()) for line in html.split("\n"))
    return "\n".join(line for line in lines if line)


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of one module, in order, paragraphs separated by line ends."""
    try:
        source = path.read_text("utf-8")
    except (OSError, UnicodeError):
        return
    quoted = sum(map(len, source.split('"""')[1::2]))
    if quoted < DOCSTRING_SHARE * len(source):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for docstring in _node_docstrings(tree):
        paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
        yield "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _node_docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        yield docstring
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _node_docstrings(child)


def join_paragraphs(paragraphs: Iterable[str]) -> Iterator[str]:
    """Join paragraphs, in order, to documents of `DOCUMENT_CHARACTERS`."""
    least, enough = DOCUMENT_CHARACTERS
    parts: list[str] = []
    size = 0
    for paragraph in paragraphs:
        parts.append(paragraph)
        size += len(paragraph)
        if size >= enough:
            yield "\n".join(parts)
            parts, size = [], 0
    if size >= least:
        yield "\n".join(parts)


class NearDuplicates:
    """Answers, text after text, whether less than half of it was seen before.

    A text is the set of its word shingles (runs of `SHINGLE_WORDS` words), hashed. Only those that start with a word
    whose hash is divisible by `SHINGLE_SAMPLE` are kept, which bounds memory and is the same choice in every copy.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __call__(self, text: str) -> bool:
        """Return whether `text` is new, and remember it if so."""
        words = [zlib.crc32(word) for word in text.lower().encode().split()]
        starts = (start for start in range(len(words) - SHINGLE_WORDS + 1) if words[start] % SHINGLE_SAMPLE == 0)
        shingles = {hash(tuple(words[start : start + SHINGLE_WORDS])) for start in starts}
        if 2 * len(shingles & self.seen) > len(shingles):
            return False
        self.seen |= shingles
        return True
