import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_lightning.data.order import WINDOW_CHUNKS, sample_indices

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=40).filter(sum).map(tuple)
SEEDS = st.integers(0, 2**63)


@given(SIZES, SEEDS, st.integers(0, 3))
def test_an_epoch_has_every_sequence_once(chunk_sizes, seed, epoch):
    total = sum(chunk_sizes)
    indices = sample_indices(epoch * total, total, seed=seed, chunk_sizes=chunk_sizes)
    assert indices.dtype == np.int64
    np.testing.assert_array_equal(np.sort(indices), np.arange(total))


@given(SIZES, SEEDS, st.integers(0, 100), st.integers(0, 100))
def test_samples_are_slices_of_one_order(chunk_sizes, seed, first, count):
    order = sample_indices(0, first + count, seed=seed, chunk_sizes=chunk_sizes)
    part = sample_indices(first, count, seed=seed, chunk_sizes=chunk_sizes)
    np.testing.assert_array_equal(part, order[first:])


def test_consecutive_samples_come_from_one_window_of_chunks():
    chunks, size = 5 * WINDOW_CHUNKS, 100
    indices = sample_indices(0, chunks * size, seed=1, chunk_sizes=(size,) * chunks)
    for window in indices.reshape(5, -1):
        assert len(np.unique(window // size)) == WINDOW_CHUNKS


def test_seed_and_epoch_change_the_order():
    first_seed, second_seed = (sample_indices(0, 300, seed=seed, chunk_sizes=(50, 50, 50)) for seed in (1, 2))
    assert not np.array_equal(first_seed, second_seed)
    assert not np.array_equal(first_seed[:150], first_seed[150:])


def test_the_order_is_the_same_on_every_platform():
    assert sample_indices(0, 12, seed=32, chunk_sizes=(5, 0, 4)).tolist() == [1, 7, 5, 6, 3, 8, 0, 4, 2, 2, 1, 5]
    three_windows = [10, 7, 16, 4, 9, 1, 19, 0, 13, 6, 5, 18, 17, 12, 11, 3, 8, 14, 15, 2]
    assert sample_indices(0, 20, seed=3, chunk_sizes=(1,) * 20).tolist() == three_windows


def test_an_empty_set_has_no_order():
    with pytest.raises(ValueError, match="no sequences"):
        sample_indices(0, 4, seed=1, chunk_sizes=(0,))
