"""The settings of the data room; plain data, no imports beyond the standard library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RUNTIME = {"identity": False}
"""Metadata of fields that change how a run is carried out but not what it computes."""


@dataclass
class DataConfig:
    """Where tokens come from and how they are laid out in rows.

    Fields marked `RUNTIME` do not take part in the identity of a run.
    """

    source: str = "docs"
    """`docs` (documentation that every installation carries), `files`, or `c4` (allenai/c4 `en` from the hub)."""
    files: Any = None
    """`source=files`: glob, or list of globs, of .txt, .jsonl, .json, each also .gz (JSON lines with a `text` field)."""
    val_files: Any = None
    """Like `files`, for validation; without it one document in `val_every` is held out."""
    val_every: int = 50
    max_documents: int | None = None
    """Stop after so many training documents (None: all; `c4` has 364,868,892)."""
    tokenizer: str = "bpe"
    """`bpe` (byte-level, trained on the corpus at prepare time), a folder with tokenizer.json, or a hub name."""
    vocab_size: int = 4096
    """Vocabulary of the trained `bpe` tokenizer; ignored for others."""
    layout: str = "packed"
    """`packed`: documents joined by EOS and cut into rows; `document`: one document per row, cut or padded (paper)."""
    seq_len: int = 128
    """Tokens per row; a row has `seq_len - 1` targets."""
    val_tokens: int = 10_000_000
    """Upper bound of validation tokens (the paper evaluates on 10M non-pad tokens)."""
    batch_size: int = 16
    """Rows per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = field(default=16, metadata=RUNTIME)
    """Rows per forward pass on one rank."""
    folder: str | None = field(default=None, metadata=RUNTIME)
    """A prepared set (local folder, or URL that litdata reads); None: derived from the settings, below `root`."""
    root: str = field(default="data", metadata=RUNTIME)
    """Prepared sets are kept here."""
    workers: int = field(default=0, metadata=RUNTIME)
    """Processes that tokenize during preparation; 0: one per core."""
    loader_workers: int = field(default=0, metadata=RUNTIME)
    """DataLoader workers; 0 reads in the main process."""


def problems(config: DataConfig) -> list[str]:
    return []
