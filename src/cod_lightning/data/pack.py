"""Pack documents into sequences of tokens in memory, for models with their own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from cod_lightning.errors import UserError


def packed(
    documents: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    separator: int | None,
    limit: int,
    length: int,
    start: int | None = None,
) -> Tensor:
    """Return at most `limit` full sequences of joined documents, read only as far as needed: int64 [n, length].

    Args:
        documents: texts.
        encode: returns the tokens of a text.
        separator: token after every document, or None.
        limit: largest number of sequences.
        length: tokens per sequence.
        start: token before every sequence, the first of its `length`, or None.

    Raises:
        UserError: the documents do not fill one sequence.
    """
    end = () if separator is None else (separator,)
    first = [] if start is None else [start]
    size = length - len(first)
    stream = chain.from_iterable((*encode(document), *end) for document in documents)
    tokens = list(islice(stream, limit * size))
    count = len(tokens) // size
    if not count:
        raise UserError(
            f"the held-out documents have {len(tokens)} tokens, less than one sequence of data.seq_len={length}"
        )
    return torch.tensor([first + tokens[index * size : (index + 1) * size] for index in range(count)])
