"""Pack documents into sequences of tokens in memory, for models with their own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from cod_lightning.errors import UserError


def pack_sequences(
    documents: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    *,
    seq_len: int,
    max_sequences: int,
    eos_id: int | None,
    bos_id: int | None = None,
) -> Tensor:
    """Return full sequences of joined documents, which are read only as far as needed: int64 [n, seq_len].

    Args:
        documents: texts.
        encode: returns the tokens of a text.
        seq_len: tokens per sequence.
        max_sequences: largest number of sequences.
        eos_id: token after every document, or None.
        bos_id: token before every sequence, the first of its `seq_len`, or None.

    Raises:
        UserError: the documents do not fill one sequence.
    """
    end = () if eos_id is None else (eos_id,)
    first = [] if bos_id is None else [bos_id]
    size = seq_len - len(first)
    stream = chain.from_iterable((*encode(document), *end) for document in documents)
    tokens = list(islice(stream, max_sequences * size))
    count = len(tokens) // size
    if not count:
        raise UserError(
            f"the held-out documents have {len(tokens)} tokens, less than one sequence of data.seq_len={seq_len}"
        )
    return torch.tensor([first + tokens[index * size : (index + 1) * size] for index in range(count)])
