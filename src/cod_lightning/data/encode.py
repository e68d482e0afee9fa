"""From text to ids: documents in batches, encoded in order by several processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np

from cod_lightning.data.instructions import Example
from cod_lightning.data.manifest import width_of
from cod_lightning.data.tokenizers import DocumentTokenizer

BATCH_CHARACTERS = 2**18
"""Text that one worker gets at a time: about 60,000 tokens, 0.1 s of work."""
DOCUMENT: np.dtype = np.dtype(
    [("characters", "<u4"), ("numbers", "<u4"), ("tokens", "<u4"), ("max_id", "<u4"), ("sha256", "V32")]
)
"""What is kept of a document: the length of its text, how many numbers it is encoded to and how many of these are ids
and not pad, the largest such id, and the SHA-256 of its text."""


@dataclass(frozen=True)
class Encoded:
    """Documents as a flat run of numbers, and what each of them holds: `DOCUMENT` [documents]."""

    ids: np.ndarray
    documents: np.ndarray

    @property
    def tokens(self) -> int:
        """Ids that are not pad."""
        return int(self.documents["tokens"].sum(dtype=np.int64))

    @property
    def max_id(self) -> int:
        """The largest id that is not pad."""
        return int(self.documents["max_id"].max(initial=0))

    def where(self, mask: np.ndarray) -> Encoded:
        """The documents at which `mask` [documents] is true."""
        return Encoded(self.ids[np.repeat(mask, self.documents["numbers"])], self.documents[mask])

    def each(self) -> Iterator[Encoded]:
        """Every document by itself."""
        ends = np.cumsum(self.documents["numbers"], dtype=np.int64)
        starts = ends - self.documents["numbers"]
        for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            yield Encoded(self.ids[start:end], self.documents[number : number + 1])


def joined(parts: list[Encoded]) -> Encoded:
    """The documents of at least one `Encoded`, one after the other."""
    return Encoded(np.concatenate([part.ids for part in parts]), np.concatenate([part.documents for part in parts]))


@dataclass(frozen=True)
class Encoder:
    """What a worker needs to turn documents into rows."""

    tokenizer: DocumentTokenizer
    layout: str
    seq_len: int

    @property
    def width(self) -> int:
        return width_of(self.layout, self.seq_len)

    @property
    def dtype(self) -> np.dtype:
        numbers = max(self.tokenizer.vocab_size, self.seq_len if self.layout == "instructions" else 0)
        return np.dtype(np.uint16 if numbers <= 2**16 else np.uint32)

    def __call__(self, documents: list[str]) -> Encoded:
        """Encode `documents` to a flat run of numbers.

        `packed`: each document and its EOS, one after the other. `document`: one row of `seq_len` ids each, padded at
        the end; one that is too long is cut and keeps its EOS as the last id, as the published runs had it.
        `instructions`: likewise one row for each `Example`, of the prompt, the answer and EOS, but one that is too long
        loses its EOS, as the answer does not end there, and one without room for a token of the answer has no row.
        Behind the ids stands the length of the prompt. Prompt and answer are encoded apart: no token is of both.
        """
        prompts = None
        if self.layout == "instructions":
            encoded, prompts = self.examples(documents)
        else:
            encoded = self.tokenizer.encode(documents)
        if self.layout == "document":
            last = self.seq_len - 1
            encoded = [ids if len(ids) <= last else [*ids[:last], self.tokenizer.eos_id] for ids in encoded]
        records = np.empty(len(documents), DOCUMENT)
        records["characters"] = [len(document) for document in documents]
        records["tokens"] = [len(ids) for ids in encoded]
        records["max_id"] = [max(ids, default=0) for ids in encoded]
        digests = b"".join(hashlib.sha256(document.encode()).digest() for document in documents)
        records["sha256"] = np.frombuffer(digests, "V32")
        if self.layout == "packed":
            records["numbers"] = records["tokens"]
            flat = np.fromiter((id for ids in encoded for id in ids), self.dtype, sum(map(len, encoded)))
            return Encoded(flat, records)
        records["numbers"] = [self.width if ids else 0 for ids in encoded]
        return Encoded(self.rows(encoded, prompts), records)

    def examples(self, documents: list[str]) -> tuple[list[list[int]], list[int]]:
        """The ids of each example, none if it has no room for a token of its answer, and the length of its prompt."""
        parts = [cast(Example, document).parts for document in documents]
        prompts = [ids[:-1] for ids in self.tokenizer.encode([prompt for prompt, _ in parts])]
        answers = self.tokenizer.encode([answer for _, answer in parts])
        room = [len(prompt) < self.seq_len for prompt in prompts]
        encoded = [
            [*prompt, *answer][: self.seq_len] if fits else []
            for prompt, answer, fits in zip(prompts, answers, room, strict=True)
        ]
        return encoded, [len(prompt) for prompt in prompts]

    def rows(self, encoded: list[list[int]], prompts: list[int] | None) -> np.ndarray:
        """One row for each that has ids, padded; behind it its number of `prompts`. Flat."""
        rows = np.full((len(encoded), self.width), self.tokenizer.pad_id, self.dtype)
        kept = np.array([bool(ids) for ids in encoded], bool)
        for row, ids in zip(rows, encoded, strict=True):
            row[: len(ids)] = ids
        if prompts is not None:
            rows[kept, -1] = np.array(prompts)[kept]
        return rows[kept].reshape(-1)


def batches(documents: Iterable[Any], characters: Callable[[Any], int] = len) -> Iterator[list[Any]]:
    """Group documents to about `BATCH_CHARACTERS`; the grouping follows from their lengths alone."""
    batch: list[Any] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += characters(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def until(encoded: Iterable[Encoded], tokens: int | None) -> Iterator[Encoded]:
    """The leading batches, to and including the one that reaches `tokens`; all without a limit."""
    read = 0
    for batch in encoded:
        yield batch
        read += batch.tokens
        if tokens is not None and read >= tokens:
            return


# --- in other processes -----------------------------------------------------------------------------------------------


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def pool(encoder: Encoder, workers: int) -> Generator[Callable[[Iterable[list[str]]], Iterator[Encoded]], None, None]:
    """Give a function that encodes batches of documents, in order, in `workers` processes."""
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker, also when the worker is this process
    try:
        if workers == 1:
            yield partial(map, encoder)
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, context, _start_worker, (encoder,)) as executor:
                yield partial(_ordered_map, executor, 4 * workers)
    finally:
        if threads is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = threads


def _ordered_map(executor: ProcessPoolExecutor, ahead: int, batches: Iterable[list[str]]) -> Iterator[Encoded]:
    """Like `executor.map`, but takes from `batches` only `ahead` more than were given out: text may be endless."""
    pending: deque = deque()
    try:
        for documents in batches:
            pending.append(executor.submit(_encode_in_worker, documents))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    # An executor's workers outlive a parent that is killed, waiting for work for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode_in_worker(documents: list[str]) -> Encoded:
    return _encoder(documents)
