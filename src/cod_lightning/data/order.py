"""The order of training sequences: a pure function of the seed and the number of the sample, in numpy.

Samples are numbered 0, 1, 2, ... over all epochs. Step `s` uses `batch_size` samples from number `s * batch_size`,
and each rank a contiguous slice of them. So any number of processes sees the same batches, and a run resumes from its
step alone.

An epoch contains every sequence once. Its chunks are permuted, then the sequences within windows of `WINDOW_CHUNKS`
consecutive chunks: a batch mixes many chunks, but only one window must be in the cache at a time.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

WINDOW_CHUNKS = 8


def sample_indices(first: int, count: int, *, seed: int, chunk_sizes: tuple[int, ...]) -> np.ndarray:
    """Return the sequence indices of the samples `first` ... `first + count - 1`: int64 [count].

    Args:
        first: number of the first sample, from 0 over all epochs.
        count: number of samples.
        seed: any integer from 0.
        chunk_sizes: sequences of each chunk; a sequence index counts over all chunks in order.

    Raises:
        ValueError: there are no sequences.
    """
    total = sum(chunk_sizes)
    if total == 0:
        raise ValueError("no sequences to order")
    indices = np.empty(count, np.int64)
    done = 0
    while done < count:
        epoch, position = divmod(first + done, total)
        starts = _window_starts(seed, epoch, chunk_sizes)
        window = int(np.searchsorted(starts, position, side="right")) - 1
        offset = position - int(starts[window])
        part = _window_indices(seed, epoch, window, chunk_sizes)[offset : offset + count - done]
        indices[done : done + part.size] = part
        done += part.size
    return indices


@lru_cache(maxsize=4)
def _chunk_order(seed: int, epoch: int, chunk_sizes: tuple[int, ...]) -> np.ndarray:
    filled = np.flatnonzero(chunk_sizes)
    return filled[_permutation(filled.size, seed, epoch)]


@lru_cache(maxsize=4)
def _window_starts(seed: int, epoch: int, chunk_sizes: tuple[int, ...]) -> np.ndarray:
    """Return the position in the epoch at which each window begins."""
    sizes = np.asarray(chunk_sizes)[_chunk_order(seed, epoch, chunk_sizes)]
    return np.concatenate([[0], np.cumsum(sizes)])[:-1:WINDOW_CHUNKS]


@lru_cache(maxsize=4)
def _window_indices(seed: int, epoch: int, window: int, chunk_sizes: tuple[int, ...]) -> np.ndarray:
    """Return the sequence indices of one window in the order of their use."""
    ends = np.cumsum(chunk_sizes)
    chunks = _chunk_order(seed, epoch, chunk_sizes)[window * WINDOW_CHUNKS : (window + 1) * WINDOW_CHUNKS]
    indices = np.concatenate([np.arange(ends[chunk] - chunk_sizes[chunk], ends[chunk]) for chunk in chunks])
    return indices[_permutation(indices.size, seed, epoch, 1 + window)]


def uniform(count: int, *key: int) -> np.ndarray:
    """Return `count` numbers in [0, 1) that depend on `key` only; see `_permutation`: float64 [count]."""
    return (np.random.PCG64(np.random.SeedSequence(key)).random_raw(count) >> np.uint64(11)) * 2.0**-53


def _permutation(count: int, *key: int) -> np.ndarray:
    """Return a permutation of `count` that depends on `key` only.

    It sorts the raw output of a bit generator, which is the same in all versions of numpy, unlike
    `Generator.permutation`. The sort is stable, so ties do not depend on the platform.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable")
