"""Encode text as ids: documents in batches, in order, in several processes."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeAlias, cast

import numpy as np

from cod_lightning.data.instructions import Example
from cod_lightning.data.manifest import row_width
from cod_lightning.data.tokenizers import DocumentTokenizer
from cod_lightning.data.workers import worker_pool

BATCH_CHARACTERS = 2**18
"""Text per task of a worker: about 60,000 tokens, 0.1 s of work."""
DOCUMENT_DTYPE: np.dtype = np.dtype([("numbers", "<u4"), ("tokens", "<u4"), ("max_id", "<u4"), ("sha256", "V32")])
"""Record of a document: numbers that it is encoded to, how many of these are non-pad ids, the largest such id, and the
SHA-256 of its text."""


@dataclass(frozen=True)
class Encoded:
    """Encoded documents: a flat array of `ids`, and a record `DOCUMENT_DTYPE` for each document."""

    ids: np.ndarray
    documents: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of non-pad ids."""
        return int(self.documents["tokens"].sum(dtype=np.int64))

    @property
    def max_id(self) -> int:
        """The largest non-pad id."""
        return int(self.documents["max_id"].max(initial=0))

    def select(self, mask: np.ndarray) -> Encoded:
        """Return the documents at which `mask` [documents] is true."""
        return Encoded(self.ids[np.repeat(mask, self.documents["numbers"])], self.documents[mask])


@dataclass(frozen=True)
class Encoder:
    """Encodes documents as sequences; can be pickled, so that workers receive a copy."""

    tokenizer: DocumentTokenizer
    layout: str
    seq_len: int

    @property
    def width(self) -> int:
        return row_width(self.layout, self.seq_len)

    @property
    def dtype(self) -> np.dtype:
        numbers = max(self.tokenizer.vocab_size, self.seq_len if self.layout == "instructions" else 0)
        return np.dtype(np.uint16 if numbers <= 2**16 else np.uint32)

    def __call__(self, documents: list[str]) -> Encoded:
        """Encode `documents` as a flat array.

        `packed`: each document and its EOS, one after the other. `document`: one sequence of `seq_len` ids each, padded
        at the end; a longer document is truncated and keeps EOS as its last id, as in the published runs.
        `instructions`: one such sequence for each `Example`, of prompt, answer and EOS, followed by the length of the
        prompt; a longer example loses its EOS, because the answer does not end there, and an example without room for
        a token of the answer has no sequence. Prompt and answer are encoded separately, so no token spans both.
        """
        prompts = None
        if self.layout == "instructions":
            encoded, prompts = self._encode_examples(documents)
        else:
            encoded = self.tokenizer.encode(documents)
        if self.layout == "document":
            last = self.seq_len - 1
            encoded = [ids if len(ids) <= last else [*ids[:last], self.tokenizer.eos_id] for ids in encoded]
        records = np.empty(len(documents), DOCUMENT_DTYPE)
        records["tokens"] = [len(ids) for ids in encoded]
        records["max_id"] = [max(ids, default=0) for ids in encoded]
        digests = b"".join(hashlib.sha256(document.encode()).digest() for document in documents)
        records["sha256"] = np.frombuffer(digests, "V32")
        if self.layout == "packed":
            records["numbers"] = records["tokens"]
            return Encoded(np.fromiter(chain.from_iterable(encoded), self.dtype, sum(map(len, encoded))), records)
        records["numbers"] = [self.width if ids else 0 for ids in encoded]
        return Encoded(self._pad(encoded, prompts), records)

    def count_truncated_answers(self, encoded: Encoded) -> int:
        """Number of `instructions` sequences without room for the whole answer and its EOS."""
        last = encoded.ids.reshape(-1, self.width)[:, self.seq_len - 1]
        return int(((last != self.tokenizer.eos_id) & (last != self.tokenizer.pad_id)).sum())

    def _encode_examples(self, documents: list[str]) -> tuple[list[list[int]], list[int]]:
        """Return the ids of each example, empty without room for its answer, and the lengths of the prompts."""
        parts = [cast(Example, document).parts for document in documents]
        prompts = [ids[:-1] for ids in self.tokenizer.encode([prompt for prompt, _ in parts])]
        answers = self.tokenizer.encode([answer for _, answer in parts])
        encoded = [
            [*prompt, *answer][: self.seq_len] if len(prompt) < self.seq_len else []
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return encoded, [len(prompt) for prompt in prompts]

    def _pad(self, encoded: list[list[int]], prompts: list[int] | None) -> np.ndarray:
        """Return a padded sequence of each document that has ids, with the length of its prompt if given: flat."""
        padded = np.full((len(encoded), self.width), self.tokenizer.pad_id, self.dtype)
        for sequence, ids in zip(padded, encoded, strict=True):
            sequence[: len(ids)] = ids
        filled = np.array([bool(ids) for ids in encoded], bool)
        if prompts is not None:
            padded[filled, -1] = np.array(prompts)[filled]
        return padded[filled].reshape(-1)


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents to about `BATCH_CHARACTERS`."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def take_tokens(encoded: Iterable[Encoded], tokens: int) -> Iterator[Encoded]:
    """Yield the leading documents, up to and including the one at which the sum of their tokens reaches `tokens`."""
    read = 0
    for batch in encoded:
        before = read + np.cumsum(batch.documents["tokens"], dtype=np.int64) - batch.documents["tokens"]
        yield batch.select(before < tokens)
        read += batch.tokens
        if read >= tokens:
            return


# --- in other processes -----------------------------------------------------------------------------------------------


EncodeAll: TypeAlias = Callable[[Iterable[list[str]]], Iterator[Encoded]]


@contextmanager
def encoder_pool(encoder: Encoder, workers: int) -> Generator[EncodeAll, None, None]:
    """Yield a function that encodes batches of documents, in order, in `workers` processes."""
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker, also when the worker is this process
    try:
        if workers == 1:
            yield partial(map, encoder)
        else:
            with worker_pool(workers, _keep_encoder, encoder) as executor:
                yield partial(_ordered_map, executor, 4 * workers)
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if threads is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = threads


def _ordered_map(executor: ProcessPoolExecutor, ahead: int, batches: Iterable[list[str]]) -> Iterator[Encoded]:
    """Like `executor.map`, but reads only `ahead` batches in advance: text may be endless."""
    pending: deque[Future[Encoded]] = deque()
    for documents in batches:
        pending.append(executor.submit(_encode_in_worker, documents))
        if len(pending) >= ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


_encoder: Encoder


def _keep_encoder(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode_in_worker(documents: list[str]) -> Encoded:
    return _encoder(documents)
