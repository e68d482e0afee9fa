"""The order of training rows: a pure function of (seed, step), in numpy.

Samples are numbered 0, 1, 2, ... over all epochs. Step `s` uses `batch_size` samples from number `s * batch_size`,
and each rank a contiguous slice of them. So any number of processes sees the same batches, and a run resumes from its
step alone.

An epoch contains every row once. Its chunks are permuted, then the rows within windows of `WINDOW_CHUNKS` consecutive
chunks: a batch mixes rows of many chunks, but only one window must be in the cache at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

WINDOW_CHUNKS = 8


def rows_of_step(
    step: int,
    *,
    seed: int,
    batch_size: int,
    rank: int,
    world_size: int,
    rows_per_chunk: Sequence[int],
) -> np.ndarray:
    """Return the row numbers of one step and rank, counted over all chunks in order: int64 [batch_size / world_size].

    Raises:
        ValueError: `batch_size` is not divisible by `world_size`, `rank` is out of range, or there are no rows.
    """
    if batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} has no equal share of a batch of {batch_size}")
    share = batch_size // world_size
    first = step * batch_size + rank * share
    return samples(first, share, seed=seed, rows_per_chunk=tuple(rows_per_chunk))


def samples(first: int, count: int, *, seed: int, rows_per_chunk: tuple[int, ...]) -> np.ndarray:
    """Return the row indices of the samples `first` ... `first + count - 1`: int64 [count]."""
    total = sum(rows_per_chunk)
    if total == 0:
        raise ValueError("no rows to order")
    indices = np.empty(count, np.int64)
    done = 0
    while done < count:
        epoch, position = divmod(first + done, total)
        starts = _window_starts(seed, epoch, rows_per_chunk)
        window = int(np.searchsorted(starts, position, side="right")) - 1
        offset = position - int(starts[window])
        part = _window_rows(seed, epoch, window, rows_per_chunk)[offset : offset + count - done]
        indices[done : done + part.size] = part
        done += part.size
    return indices


@lru_cache(maxsize=4)
def _chunk_order(seed: int, epoch: int, rows_per_chunk: tuple[int, ...]) -> np.ndarray:
    filled = np.flatnonzero(rows_per_chunk)
    return filled[_permutation(filled.size, seed, epoch)]


@lru_cache(maxsize=4)
def _window_starts(seed: int, epoch: int, rows_per_chunk: tuple[int, ...]) -> np.ndarray:
    """Return the position in the epoch at which each window begins."""
    sizes = np.asarray(rows_per_chunk)[_chunk_order(seed, epoch, rows_per_chunk)]
    return np.concatenate([[0], np.cumsum(sizes)])[:-1:WINDOW_CHUNKS]


@lru_cache(maxsize=4)
def _window_rows(seed: int, epoch: int, window: int, rows_per_chunk: tuple[int, ...]) -> np.ndarray:
    """Return the rows of one window in the order in which they are used."""
    ends = np.cumsum(rows_per_chunk)
    chunks = _chunk_order(seed, epoch, rows_per_chunk)[window * WINDOW_CHUNKS : (window + 1) * WINDOW_CHUNKS]
    rows = np.concatenate([np.arange(ends[chunk] - rows_per_chunk[chunk], ends[chunk]) for chunk in chunks])
    return rows[_permutation(rows.size, seed, epoch, 1 + window)]


def uniform(count: int, *key: int) -> np.ndarray:
    """Return `count` numbers in [0, 1) that depend on `key` only; see `_permutation`: float64 [count]."""
    return (np.random.PCG64(np.random.SeedSequence(key)).random_raw(count) >> np.uint64(11)) * 2.0**-53


def _permutation(count: int, *key: int) -> np.ndarray:
    """Return a permutation of `count` that depends on `key` only.

    It sorts the raw output of a bit generator, which is the same in all versions of numpy, unlike
    `Generator.permutation`. The sort is stable, so ties do not depend on the platform.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable")
