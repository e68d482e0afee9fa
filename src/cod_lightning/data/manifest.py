"""`manifest.json`: what a prepared set holds, how to recognise it, and how to tell that it is whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from cod_lightning.data.config import LAYOUTS
from cod_lightning.errors import DAMAGED, UserError

FORMAT = 2
"""Newest version of the layout of a prepared set; a reader refuses newer ones."""
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
INDEX = "index.json"
"""litdata's own list of chunks, one per split."""
SPLITS = ("train", "val")


def format_of(layout: str) -> int:
    """The version that a set of such rows has: `instructions` came with the second, the others are as in the first."""
    return 2 if layout == "instructions" else 1


def width_of(layout: str, seq_len: int) -> int:
    """Numbers of a stored row: `seq_len` ids, behind which `instructions` have the length of the prompt."""
    return seq_len + (layout == "instructions")


@dataclass(frozen=True)
class Chunk:
    """One file of rows: `rows` rows in `bytes` bytes with this SHA-256."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split: `rows` rows with `tokens` non-pad tokens, the largest of them `max_id`."""

    rows: int
    tokens: int
    max_id: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Source:
    """The text: name of the corpus, a SHA-256 of the documents read, and their number per split.

    The hash is of the documents' SHA-256 digests, one after the other, those of training first; in the first sets, made
    before 0.1.0, of the documents themselves, each with a zero byte behind it. Of instructions there are more documents
    than rows where some have no room for an answer.
    """

    name: str
    sha256: str
    documents: dict[str, int]


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer: its setting (`data.tokenizer`), SHA-256 of its JSON, and the ids that rows are made with.

    `requested` is `data.vocab_size` for a trained `bpe`, which may end up smaller on little text; None for others.
    """

    name: str
    sha256: str
    vocab_size: int
    pad_id: int
    eos_id: int
    requested: int | None


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    format: int
    tokenizer: TokenizerRecord
    source: Source
    layout: str
    seq_len: int
    dtype: str
    train: Split
    val: Split

    @property
    def width(self) -> int:
        return width_of(self.layout, self.seq_len)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what a training run sees: tokenizer, layout and the bytes of every chunk, in order.

        It does not depend on paths, dates, or how many processes prepared the set.
        """
        content = {
            "tokenizer": [self.tokenizer.sha256, self.tokenizer.pad_id, self.tokenizer.eos_id],
            "rows": [self.layout, self.seq_len, self.dtype],
            "chunks": {split: [chunk.sha256 for chunk in self.split(split).chunks] for split in SPLITS},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def split(self, name: str) -> Split:
        return {"train": self.train, "val": self.val}[name]

    @property
    def sha256(self) -> str:
        """Of all that it holds: numbers of rows and tokens too, of which the fingerprint knows nothing."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({"fingerprint": self.fingerprint, "sha256": self.sha256, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Parse `text`; `where` names the file in messages.

        Raises:
            UserError: Damaged, altered, or written by a newer version.
        """
        try:
            record = json.loads(text)
            version = int(record["format"])
        except (*DAMAGED, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{where} is damaged ({error!r}); remove the set and prepare it again") from error
        if version > FORMAT:
            raise UserError(f"{where} has format {version}, newer than {FORMAT}, the newest known here; upgrade")
        try:
            fingerprint, sha256 = record.pop("fingerprint"), record.pop("sha256", None)  # early sets have no SHA-256
            manifest = _as(cls, record)
            manifest.check()
            if fingerprint != manifest.fingerprint or sha256 not in (None, manifest.sha256):
                raise ValueError("its fingerprint does not fit its content")
        except (*DAMAGED, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where} is damaged ({error!r}); remove the set and prepare it again") from error
        return manifest

    def check(self) -> None:
        """Compare numbers that depend on each other.

        Raises:
            ValueError: they do not fit.
        """
        if self.dtype not in ("uint16", "uint32") or self.seq_len < 2 or self.layout not in (*LAYOUTS, "instructions"):
            raise ValueError(f"no rows are {self.layout!r}, {self.seq_len} long and {self.dtype!r}")
        row = self.width * int(self.dtype.removeprefix("uint")) // 8
        for name in SPLITS:
            split = self.split(name)
            if split.rows != sum(chunk.rows for chunk in split.chunks):
                raise ValueError(f"{name} has not as many rows as its chunks")
            for chunk in split.chunks:
                if chunk.rows < 1 or chunk.bytes < chunk.rows * row or Path(chunk.name).name != chunk.name:
                    raise ValueError(f"{chunk.name!r} cannot hold {chunk.rows} rows in {chunk.bytes} bytes")


def _as(kind: Any, value: Any) -> Any:
    """A JSON value as one of a type: a dataclass of this file, a tuple or dictionary of other types, or a plain one.

    Raises:
        TypeError: it is none, or has other fields.
    """
    if is_dataclass(kind):
        types = get_type_hints(kind)
        return kind(**{name: _as(types.get(name), part) for name, part in dict(value).items()})
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_as(get_args(kind)[0], part) for part in value)
    if get_origin(kind) is dict and isinstance(value, dict):
        return {name: _as(get_args(kind)[1], part) for name, part in value.items()}
    if get_origin(kind) in (tuple, dict) or type(value) not in (get_args(kind) or (kind,)):
        raise TypeError(f"{value!r} is not {kind}")
    return value


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the prepared set in a local `folder`.

    Raises:
        UserError: The folder is missing or holds no prepared set; or as `Manifest.from_json`.
    """
    try:
        text = (folder / MANIFEST).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not a prepared set ({MANIFEST} cannot be read: {error}): name the folder that prepare printed"
        ) from error
    return Manifest.from_json(text, str(folder / MANIFEST))


def damage(folder: Path, manifest: Manifest) -> list[str]:
    """Return a line for every file of a local set that is missing or has the wrong size (contents are not read)."""
    found = [f"{folder / TOKENIZER}: missing"] if not (folder / TOKENIZER).is_file() else []
    for split in SPLITS:
        if not (folder / split / INDEX).is_file():
            found.append(f"{folder / split / INDEX}: missing")
        for chunk in manifest.split(split).chunks:
            path = folder / split / chunk.name
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                found.append(f"{path}: missing")
            elif size != chunk.bytes:
                found.append(f"{path}: {size:,} bytes instead of {chunk.bytes:,}")
    return found
