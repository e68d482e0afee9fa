"""`manifest.json`: the content of a prepared set, its fingerprint, and a check for damage."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cod_lightning.data.config import LAYOUTS
from cod_lightning.errors import DAMAGED, UserError, first_line
from cod_lightning.files import read_regular
from cod_lightning.typed_json import from_json

FORMAT = 2
"""Newest version of the layout of a prepared set; a reader refuses newer ones."""
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
INDEX = "index.json"
"""litdata's list of chunks, one per split."""
SPLITS = ("train", "val")


def format_version(layout: str) -> int:
    """Return the format version of a set with this layout: 2 for `instructions`, else 1."""
    return 2 if layout == "instructions" else 1


def row_width(layout: str, seq_len: int) -> int:
    """Return how many numbers a stored sequence has: `seq_len` ids; `instructions` append the length of the prompt."""
    return seq_len + (layout == "instructions")


@dataclass(frozen=True)
class Chunk:
    """One file of `rows` sequences."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split: `rows` sequences with `tokens` non-pad tokens, of which `max_id` is the largest."""

    rows: int
    tokens: int
    max_id: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Source:
    """The text: name of the corpus, SHA-256 of the documents, and their number per split.

    The hash covers the SHA-256 digests of all documents in order, training first. Instructions without room for an
    answer have no sequence.
    """

    name: str
    sha256: str
    documents: dict[str, int]


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer: its setting (`data.tokenizer`), SHA-256 of its JSON, and the ids of its vocabulary.

    `requested` is `data.vocab_size` for a trained `bpe`, which may be smaller on little text; None for others.
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
    def row_width(self) -> int:
        return row_width(self.layout, self.seq_len)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the input of a training run: tokenizer, layout and the bytes of every chunk, in order.

        It does not depend on paths, dates, or the number of processes that prepared the set.
        """
        content = {
            "tokenizer": [self.tokenizer.sha256, self.tokenizer.pad_id, self.tokenizer.eos_id],
            "rows": [self.layout, self.seq_len, self.dtype],
            "chunks": {split: [chunk.sha256 for chunk in self.split(split).chunks] for split in SPLITS},
        }
        return _sha256(content)

    @property
    def sha256(self) -> str:
        """SHA-256 of the whole content, including counts, which the fingerprint leaves out."""
        return _sha256(asdict(self))

    def split(self, name: str) -> Split:
        return {"train": self.train, "val": self.val}[name]

    def to_json(self) -> str:
        return json.dumps({"fingerprint": self.fingerprint, "sha256": self.sha256, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Parse `text`; `source` names the file in messages.

        Raises:
            UserError: damaged, altered, or written by a newer version.
        """
        try:
            record = from_json(dict[str, Any], json.loads(text))
            if (version := from_json(int, record.get("format"))) > FORMAT:
                raise UserError(f"{source} has format {version}, but this version reads up to {FORMAT}; upgrade")
            fingerprint, sha256 = record.pop("fingerprint", None), record.pop("sha256", None)
            manifest = from_json(cls, record)
            manifest.check()
            if (fingerprint, sha256) != (manifest.fingerprint, manifest.sha256):
                raise ValueError("its fingerprint does not match its content")
        except DAMAGED as error:
            raise UserError(
                f"{source} is damaged ({first_line(error)}); remove the set and prepare it again"
            ) from error
        return manifest

    def check(self) -> None:
        """Raise a ValueError for an unsupported layout, or numbers that contradict each other."""
        if self.dtype not in ("uint16", "uint32") or self.seq_len < 2 or self.layout not in (*LAYOUTS, "instructions"):
            raise ValueError(f"unsupported sequences: {self.layout!r}, length {self.seq_len}, {self.dtype!r}")
        row_bytes = self.row_width * int(self.dtype.removeprefix("uint")) // 8
        for name in SPLITS:
            split = self.split(name)
            if split.rows != sum(chunk.rows for chunk in split.chunks):
                raise ValueError(f"{name} and its chunks have different numbers of sequences")
            for chunk in split.chunks:
                if chunk.rows < 1 or chunk.bytes < chunk.rows * row_bytes or Path(chunk.name).name != chunk.name:
                    raise ValueError(f"{chunk.name!r} cannot hold {chunk.rows} sequences in {chunk.bytes} bytes")


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the prepared set in a local `folder`.

    Raises:
        UserError: the folder is missing or holds no prepared set; or as `Manifest.from_json`.
    """
    try:
        text = read_regular(folder / MANIFEST)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not a prepared set ({MANIFEST} cannot be read: {error}): name the folder that prepare printed"
        ) from error
    return Manifest.from_json(text, str(folder / MANIFEST))


def find_damage(folder: Path, manifest: Manifest) -> list[str]:
    """Return a line for every file of a local set that is missing or has the wrong size, and for another tokenizer.

    Chunks are not read.
    """
    tokenizer = folder / TOKENIZER
    sizes: dict[Path, int | None] = {tokenizer: None}
    for split in SPLITS:
        sizes[folder / split / INDEX] = None
        sizes |= {folder / split / chunk.name: chunk.bytes for chunk in manifest.split(split).chunks}
    problems = file_problems(sizes)
    if tokenizer.is_file() and hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest.tokenizer.sha256:
        problems.append(f"{tokenizer} is damaged: its SHA-256 differs from the manifest")
    return problems


def file_problems(sizes: dict[Path, int | None]) -> list[str]:
    """Return a line for every file that is missing or does not have its size in bytes, if one is given."""
    problems = []
    for path, size in sizes.items():
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif size is not None and path.stat().st_size != size:
            problems.append(f"{path}: {path.stat().st_size:,} bytes instead of {size:,}")
    return problems
