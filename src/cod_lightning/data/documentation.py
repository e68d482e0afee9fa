"""The corpus `docs`: English documentation that every installation carries.

It consists of botocore's API documentation (latest version of each service) and of the docstrings of the standard
library and of `DOCS_PACKAGES`, parsed and never imported.
"""

from __future__ import annotations

import ast
import gzip
import importlib.metadata
import importlib.util
import inspect
import json
import platform
import re
import string
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from typing import Any

from cod_lightning.data.workers import worker_pool

DOCS_PACKAGES = ("torch", "sympy", "networkx", "numpy", "torchmetrics", "lightning")
DOCS_RECIPE = 1
"""Increase when this module yields other text from the same packages."""
DOCS_CHARACTERS = 20_000_000
DOCUMENT_CHARACTERS = (400, 1_600)
"""A document ends when it reaches the larger number; one that stays below the smaller is dropped."""
PARAGRAPH_CHARACTERS = 120
"""Least length of a paragraph; shorter ones are mostly labels and signatures."""
LETTERS = f"{string.ascii_letters} ".encode()
LETTER_SHARE = 0.87
"""Least share of `LETTERS` in a paragraph; below are tables, formulas and code."""
SHINGLE_WORDS = 5
SHINGLE_SAMPLE = 4
"""One in `SHINGLE_SAMPLE` words, chosen by its hash, starts a shingle."""
DOCSTRING_SHARE = 0.4
"""Least share of docstrings in a module; parsing others costs more time than their text is worth."""
_SKIPPED = {"test", "tests", "testing", "site-packages", "dist-packages", "idlelib", "lib2to3"}


def docs(workers: int = 1) -> list[str]:
    """Return 10-20 MB of prose in documents of paragraphs, without near-duplicate paragraphs.

    The text depends only on the versions that `docs_versions` returns.
    """
    units = _units()
    if workers > 1:
        with worker_pool(workers) as pool:
            paragraphs = list(pool.map(_unit_paragraphs, units, chunksize=16))
    else:
        paragraphs = [_unit_paragraphs(unit) for unit in units]
    duplicates = NearDuplicates()
    documents: list[str] = []
    for unit in paragraphs:
        documents += join_paragraphs(paragraph for paragraph in unit if duplicates.is_new(paragraph))
    return _thin_out(documents, DOCS_CHARACTERS)


def docs_versions() -> dict[str, Any]:
    """Return the versions that the text of `docs` depends on."""
    installed = [name for name in ("botocore", *DOCS_PACKAGES) if importlib.util.find_spec(name)]
    versions = {name: importlib.metadata.version(name) for name in installed}
    return {"python": platform.python_version(), "recipe": DOCS_RECIPE, **versions}


def _thin_out(documents: list[str], characters: int) -> list[str]:
    """Drop documents evenly until at most `characters` remain, so that every source keeps its share."""
    total = sum(map(len, documents))
    if total <= characters:
        return documents
    selected: list[str] = []
    read = used = 0
    for document in documents:
        read += len(document)
        if used + len(document) <= characters * read / total:
            selected.append(document)
            used += len(document)
    return selected


def _units() -> list[list[Path]]:
    """Return groups of files with one topic: a service of botocore, or a folder of a package."""
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
    texts = (text for path in files for text in extract(path))
    return [paragraph for text in texts for paragraph in text.split("\n") if _is_prose(paragraph)]


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < PARAGRAPH_CHARACTERS or ">>>" in paragraph:
        return False
    text = paragraph.encode()
    return len(text.translate(None, LETTERS)) <= (1 - LETTER_SHARE) * len(text)


def _service_texts(path: Path) -> Iterator[str]:
    """Return the documentation strings of one service, paragraphs separated by line ends."""
    texts: list[str] = []

    def collect(node: dict[str, Any]) -> None:
        text = node.get("documentation")
        if isinstance(text, str) and len(text) >= PARAGRAPH_CHARACTERS:
            texts.append(text)

    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        json.load(file, object_hook=collect)
    return map(html_text, dict.fromkeys(texts))


class _TextExtractor(HTMLParser):
    INLINE = frozenset({"a", "b", "code", "em", "i", "span", "strong", "sub", "sup", "u", "var"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        self.parts.append(" ".join(data.split("\n")))


def html_text(html: str) -> str:
    """Return the text of `html`: entities decoded, one line for each block (paragraph, list item, ...)."""
    if "<" in html or "&" in html:
        extractor = _TextExtractor()
        extractor.feed(html)
        extractor.close()
        html = "".join(extractor.parts)
    lines = (" ".join(line.split()) for line in html.split("\n"))
    return "\n".join(line for line in lines if line)


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of one module, in order, paragraphs separated by line ends."""
    try:
        source = path.read_text("utf-8")
        if sum(map(len, source.split('"""')[1::2])) < DOCSTRING_SHARE * len(source):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
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
    """A filter of texts more than half of which occurred in earlier ones.

    A text is the set of its hashed word shingles (runs of `SHINGLE_WORDS` words). Only shingles whose first word has a
    hash divisible by `SHINGLE_SAMPLE` count, which bounds memory and selects the same ones in every copy.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def is_new(self, text: str) -> bool:
        """Return whether `text` is new, and remember it if so."""
        words = [zlib.crc32(word) for word in text.lower().encode().split()]
        starts = (start for start in range(len(words) - SHINGLE_WORDS + 1) if words[start] % SHINGLE_SAMPLE == 0)
        shingles = {hash(tuple(words[start : start + SHINGLE_WORDS])) for start in starts}
        if 2 * len(shingles & self.seen) > len(shingles):
            return False
        self.seen |= shingles
        return True
