"""The settings of the data room; plain data, so that a configuration is checked without importing torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cod_lightning.settings import setting, setting_errors

INSTRUCTION_SOURCES = ("instructions", "drawn_instructions")
FILE_SOURCES = ("files", "instructions")
SHARDED_SOURCES = (*FILE_SOURCES, "c4")
"""Made of files, so that several machines can prepare a share each."""
SOURCES = ("docs", "files", "c4", *INSTRUCTION_SOURCES)
LAYOUTS = ("packed", "document")
SMALLEST_BPE = 258
"""256 bytes, pad and EOS."""
DRAWN_CLASSES = ("checks", "cross", "diagonals", "disc", "horizontals", "ring", "square", "verticals")
IMAGE_SOURCES = ("drawn", "folder")


@dataclass
class DataConfig:
    """Where tokens come from and how they are laid out in rows."""

    source: str = setting("docs", choices=SOURCES)
    """`docs` (documentation that every installation carries), `files`, or `c4` (allenai/c4 `en` from the hub); for
    fine-tuning on answers `instructions` (files), or `drawn_instructions` (questions that the package makes up)."""
    files: Any = None
    """Glob or list of globs. `source=files`: .txt, .jsonl, .json, each also .gz (JSON lines with a `text` field).
    `source=instructions`: .jsonl, .json, each also .gz, of Commonsense170K's records, as lines or as one list."""
    val_files: Any = None
    """Like `files`, for validation; without it one document in `val_every` is held out."""
    val_every: int = setting(50, at_least=2)
    sha256: str | None = None
    """SHA-256 of the documents, as the manifest of a prepared set has it: other text is refused. The text is then known
    by it, and no longer by the names of its files. None: any text."""
    repeat: bool = setting(True, runtime=True)
    """False: refuse a run that would read a training row a second time."""
    max_documents: int | None = setting(None, at_least=1)
    """Stop after so many training documents (None: all; `c4` has 364,868,892)."""
    tokenizer: str = "bpe"
    """`bpe` (byte-level, trained on the corpus at prepare time), a folder with tokenizer.json, or a hub name."""
    vocab_size: int = 4096
    """Vocabulary of the trained `bpe` tokenizer; ignored for others."""
    layout: str = setting("packed", choices=LAYOUTS)
    """`packed`: documents joined by EOS and cut into rows; `document`: one document per row, cut or padded (paper).
    Without effect on instructions, which have one example per row."""
    seq_len: int = setting(128, at_least=2)
    """Tokens per row; a row has `seq_len - 1` targets."""
    val_tokens: int = 10_000_000
    """Upper bound of validation tokens (the paper evaluates on 10M non-pad tokens)."""
    batch_size: int = setting(16, at_least=1)
    """Rows per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = setting(16, runtime=True, at_least=1)
    """Rows per forward pass on one rank."""
    folder: str | None = None
    """A prepared set (local folder, or URL that litdata reads); None: derived from the settings, below `root`."""
    root: str = setting("data", runtime=True)
    """Prepared sets are kept here."""
    workers: int = setting(0, runtime=True, at_least=0)
    """Processes that tokenize during preparation; 0: one per core."""
    loader_workers: int = setting(0, runtime=True, at_least=0)
    """DataLoader workers; 0 reads in the main process."""

    @property
    def row_layout(self) -> str:
        """What rows are made of: `layout`, or `instructions`."""
        return "instructions" if self.source in INSTRUCTION_SOURCES else self.layout


def patterns(value: Any) -> list[str]:
    """Return `data.files` or `data.val_files` as a list of globs: one string, several, or None."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def problems(config: DataConfig) -> list[str]:
    """One error for each field with an invalid value."""
    errors = setting_errors(config, "data.")
    for key in ("files", "val_files"):
        value = getattr(config, key)
        if value is None:
            continue
        if not isinstance(value, str | list) or not all(isinstance(glob, str) and glob for glob in patterns(value)):
            errors.append(f"data.{key}={value!r} must be a glob or a list of globs")
        elif config.source in SOURCES and config.source not in FILE_SOURCES:
            errors.append(f"data.source={config.source} does not read data.{key}: use data.source=files")
    if config.source in FILE_SOURCES and not config.files and config.folder is None:
        errors.append(
            f"data.files is empty: data.source={config.source} needs a glob, like data.files='text/*.json.gz'"
        )
    if config.val_tokens < config.seq_len:
        errors.append(f"data.val_tokens={config.val_tokens} must be at least data.seq_len={config.seq_len}")
    if config.tokenizer == "bpe" and config.vocab_size < SMALLEST_BPE:
        errors.append(f"data.vocab_size={config.vocab_size} must be at least {SMALLEST_BPE}")
    if config.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", config.sha256):
        errors.append(f"data.sha256={config.sha256!r} must be 64 hexadecimal digits, as in the set's manifest.json")
    if config.folder == "":
        errors.append("data.folder is empty: name a prepared set, or pass data.folder=null")
    if not config.tokenizer:
        errors.append("data.tokenizer is empty: use bpe, a folder with tokenizer.json or a name on the hub")
    return errors


@dataclass
class ImageConfig:
    """Where images come from and how they are cut into tokens, for `task=vision`.

    Of `DataConfig` that task takes the batch sizes and `loader_workers`; a row is an image.
    """

    source: str = setting("drawn", choices=IMAGE_SOURCES)
    """`drawn` (small pictures of stripes and shapes that the package draws itself), or `folder`."""
    folder: str | None = None
    """`source=folder`: holds train/CLASS/ and val/CLASS/ with .jpg, .jpeg and .png files."""
    classes: int | None = setting(None, at_least=1)
    """`source=folder`: how many there must be, so that an incomplete copy is found; None: as many as there are."""
    size: int = setting(32, at_least=1)
    """Side in pixels of what the model sees."""
    patch_size: int = setting(8, at_least=1)
    """Side in pixels of a patch, which is one token."""
    min_crop: float = setting(0.08, above=0, at_most=1)
    """Smallest share of an image that a training crop shows; 1: all of it."""

    @property
    def patches(self) -> int:
        """Tokens of an image, without the class token."""
        return (self.size // self.patch_size) ** 2

    @property
    def known_classes(self) -> int | None:
        """Their number; None where only the folder knows it."""
        return len(DRAWN_CLASSES) if self.source == "drawn" else self.classes


def image_problems(config: ImageConfig) -> list[str]:
    """One error for each field with an invalid value."""
    errors = setting_errors(config, "images.")
    if config.source == "folder" and not config.folder:
        errors.append("images.folder is empty: images.source=folder needs one that holds train/CLASS/ and val/CLASS/")
    if config.patch_size > 0 and config.size % config.patch_size:
        errors.append(f"images.size={config.size} must be a multiple of images.patch_size={config.patch_size}")
    return errors
