"""Pack documents into rows of tokens in memory, for models with their own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cod_lightning.errors import UserError


def packed(
    documents: Iterable[str], encode: Callable[[str], Sequence[int]], separator: int | None, max_rows: int, length: int
) -> Tensor:
    """Return the first documents as full rows, one after the other with a separator between: int64 [rows, length].

    Args:
        documents: read only as far as needed.
        encode: returns the tokens of a text.
        separator: token after every document, or None.
        max_rows: largest number of rows to return.
        length: tokens per row.

    Raises:
        UserError: the documents do not fill one row.
    """
    tokens: list[int] = []
    for document in documents:
        tokens += [*encode(document), *([] if separator is None else [separator])]
        if len(tokens) >= max_rows * length:
            break
    full = min(max_rows, len(tokens) // length)
    if not full:
        raise UserError(f"the held-out documents have {len(tokens)} tokens, less than one row of data.seq_len={length}")
    return torch.tensor(tokens[: full * length]).view(full, length)
