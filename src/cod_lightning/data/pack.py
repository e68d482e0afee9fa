"""Rows of tokens straight from documents, for models that come with a tokenizer of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cod_lightning.errors import UserError


def packed(
    documents: Iterable[str], encode: Callable[[str], Sequence[int]], separator: int | None, rows: int, length: int
) -> Tensor:
    """The first documents in full rows, one after the other with a separator between: int64 [rows, length].

    Args:
        documents: read only as far as needed.
        encode: gives the tokens of a text.
        separator: token behind every document, None for none.
        rows: how many.
        length: tokens in each.

    Raises:
        UserError: the documents do not fill one row; fewer rows than asked for are returned otherwise.
    """
    tokens: list[int] = []
    for document in documents:
        tokens += [*encode(document), *([] if separator is None else [separator])]
        if len(tokens) >= rows * length:
            break
    full = min(rows, len(tokens) // length)
    if not full:
        raise UserError(f"the held-out documents have {len(tokens)} tokens, less than one row of data.seq_len={length}")
    return torch.tensor(tokens[: full * length]).view(full, length)
