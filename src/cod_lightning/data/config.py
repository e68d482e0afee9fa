"""Settings of tokens and images; free of torch, so that a configuration is checked quickly."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from typing import Any

from cod_lightning.settings import MAX_TOKENS, setting, setting_errors

INSTRUCTION_SOURCES = ("instructions", "drawn_instructions")
FILE_SOURCES = ("files", "instructions")
SHARDED_SOURCES = (*FILE_SOURCES, "c4")
"""Sources that consist of files, so that each of several machines can prepare a share."""
SOURCES = ("docs", "files", "c4", *INSTRUCTION_SOURCES)
LAYOUTS = ("packed", "document")
MIN_BPE_VOCAB = 258
"""Smallest vocabulary: 256 bytes, pad and EOS."""
TEXT_FIELD, UTF_8 = "text", "utf-8"
MAX_PROCESSES = 1024
"""More than one machine can use; like the other upper bounds, it makes a mistyped number an error."""
MAX_SEQ_LEN = 2**24
DRAWN_SHAPES = ("checks", "cross", "diagonals", "disc", "horizontals", "ring", "square", "verticals")
IMAGE_SOURCES = ("drawn", "folder")


@dataclass
class DataConfig:
    """Source of the tokens and layout of the sequences."""

    source: str = setting("docs", choices=SOURCES)
    """`docs` (installed documentation), `files`, or `c4` (allenai/c4 `en` from the hub); for fine-tuning on answers
    `instructions` (files), or `drawn_instructions` (generated questions)."""
    files: Any = None
    """Glob or list of globs. `source=files`: .txt and .md (one document each), .jsonl (one JSON object a line), .json
    (the same, or one list), .csv and .parquet, whose `text_field` is the text; each but .parquet also .gz or .zst.
    `source=instructions`: records of Commonsense170K in any of these but text."""
    val_files: Any = None
    """Like `files`, for validation; None: hold out one document in `val_every`."""
    text_field: str = TEXT_FIELD
    """Field or column with the text, in files of records."""
    encoding: str = UTF_8
    """Encoding of the files: `utf-8`, `latin-1`, `utf-16` or any other that Python knows; .parquet ignores it."""
    val_every: int = setting(50, at_least=2)
    """Hold out every `val_every`-th document; of fewer documents, the last 1/`val_every` of the text."""
    sha256: str | None = None
    """SHA-256 of the documents (`source.sha256` in manifest.json): other text is refused, and the names of the files
    do not affect the identity of a run. None: any text."""
    repeat: bool = setting(True, runtime=True)
    """False: refuse a run that would read a training sequence a second time."""
    max_documents: int | None = setting(None, at_least=1)
    """Number of training documents to use; None: all (`c4` has 364,868,892)."""
    tokenizer: str = "bpe"
    """`bpe` (byte-level, trained on the corpus at prepare time), a folder with tokenizer.json, or a hub name."""
    vocab_size: int = setting(4096, at_most=MAX_TOKENS)
    """Size of the trained `bpe` tokenizer."""
    layout: str = setting("packed", choices=LAYOUTS)
    """`packed`: documents joined by EOS and split into sequences; `document`: one document per sequence, truncated or
    padded (paper). Instructions ignore it: they have one example per sequence."""
    seq_len: int = setting(128, at_least=2, at_most=MAX_SEQ_LEN)
    """Tokens per sequence, of which `seq_len - 1` are targets."""
    val_tokens: int = 10_000_000
    """Largest number of validation tokens; the paper evaluates on 10M non-pad tokens."""
    batch_size: int = setting(16, at_least=1, at_most=2**24)
    """Sequences per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = setting(16, runtime=True, at_least=1, at_most=2**24)
    """Sequences per forward pass on one rank."""
    folder: str | None = None
    """A prepared set: local folder, or URL that litdata reads; None: the set in `root` that the settings describe."""
    root: str = setting("data", runtime=True)
    """Folder of the prepared sets and of the cache."""
    workers: int = setting(0, runtime=True, at_least=0, at_most=MAX_PROCESSES)
    """Processes that tokenize during preparation; 0: one per core."""
    loader_workers: int = setting(0, runtime=True, at_least=0, at_most=MAX_PROCESSES)
    """DataLoader workers; 0 reads in the main process, as validation tokens always are."""

    @property
    def codec(self) -> str:
        """`encoding`, where `utf-8` stands for all spellings of it, such as UTF8."""
        return UTF_8 if codecs.lookup(self.encoding).name == UTF_8 else self.encoding

    @property
    def row_layout(self) -> str:
        """Layout of the sequences: `layout`, or `instructions`."""
        return "instructions" if self.source in INSTRUCTION_SOURCES else self.layout


def patterns(value: Any) -> list[str]:
    """Return `data.files` or `data.val_files`, which is a string, a list or None, as a list of globs."""
    return [value] if isinstance(value, str) else list(value or ())


def data_errors(config: DataConfig) -> list[str]:
    """Return one error for each field with an invalid value."""
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
    if config.tokenizer == "bpe" and config.vocab_size < MIN_BPE_VOCAB:
        errors.append(f"data.vocab_size={config.vocab_size} must be at least {MIN_BPE_VOCAB}")
    if config.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", config.sha256):
        errors.append(f"data.sha256={config.sha256!r} must be 64 hexadecimal digits, as in the set's manifest.json")
    if not config.text_field:
        errors.append("data.text_field is empty: name the field with the text")
    try:
        "a".encode(config.encoding)
    except (LookupError, ValueError):  # also of a character that no name has
        errors.append(f"data.encoding={config.encoding!r} is not an encoding: use utf-8, latin-1 or utf-16")
    if config.folder == "":
        errors.append("data.folder is empty: name a prepared set, or pass data.folder=null")
    if not config.root:
        errors.append("data.root is empty: name the folder of the prepared sets, such as data")
    if not config.tokenizer:
        errors.append("data.tokenizer is empty: use bpe, a folder with tokenizer.json or a name on the hub")
    return errors


def is_hub_name(tokenizer: str) -> bool:
    """Whether `data.tokenizer` has the form NAME or OWNER/NAME of the hub, which a relative folder may have too."""
    return not tokenizer.startswith((".", "/", "~")) and tokenizer.count("/") <= 1


@dataclass
class ImageConfig:
    """Source of the images and their division into patches, for `task=vision`.

    That task uses the batch sizes, in images, and `loader_workers` of `DataConfig`.
    """

    source: str = setting("drawn", choices=IMAGE_SOURCES)
    """`drawn` (small generated pictures of stripes and shapes), or `folder`."""
    folder: str | None = None
    """`source=folder`: folder with train/CLASS/ and val/CLASS/, which have .jpg, .jpeg and .png files."""
    classes: int | None = setting(None, at_least=1, at_most=2**24)
    """`source=folder`: expected number of classes, to detect an incomplete copy; None: any."""
    size: int = setting(32, at_least=1, at_most=2**14)
    """Side of the model input in pixels."""
    patch_size: int = setting(8, at_least=1, at_most=2**14)
    """Side of a patch, which is one token, in pixels."""
    min_crop: float = setting(0.08, above=0, at_most=1)
    """Smallest share of an image in a training crop; 1: the whole image, or its centre beyond an aspect of 4:3."""

    @property
    def patches(self) -> int:
        """Tokens per image, without the class token."""
        return (self.size // self.patch_size) ** 2

    @property
    def known_classes(self) -> int | None:
        """Number of classes; None if the folder determines it."""
        return len(DRAWN_SHAPES) if self.source == "drawn" else self.classes


def image_errors(config: ImageConfig) -> list[str]:
    """Return one error for each field with an invalid value."""
    errors = setting_errors(config, "images.")
    if config.source == "folder" and not config.folder:
        errors.append("images.folder is empty: images.source=folder needs one that holds train/CLASS/ and val/CLASS/")
    if config.patch_size > 0 and config.size % config.patch_size:
        errors.append(f"images.size={config.size} must be a multiple of images.patch_size={config.patch_size}")
    return errors
