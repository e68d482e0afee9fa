from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_lightning.data.order import WINDOW_CHUNKS, rows_of_step, samples

CHUNKS = st.lists(st.integers(0, 12), min_size=1, max_size=40).filter(sum).map(tuple)
SEEDS = st.integers(0, 2**63)


@given(CHUNKS, SEEDS, st.integers(0, 3))
def test_an_epoch_has_every_row_once(rows_per_chunk, seed, epoch):
    total = sum(rows_per_chunk)
    rows = samples(epoch * total, total, seed=seed, rows_per_chunk=rows_per_chunk)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(np.sort(rows), np.arange(total))


@given(CHUNKS, SEEDS, st.integers(0, 300), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_ranks_divide_the_same_global_batch(rows_per_chunk, seed, step, world_size):
    of = partial(rows_of_step, step, seed=seed, batch_size=12, rows_per_chunk=rows_per_chunk)
    shares = [of(rank=rank, world_size=world_size) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(shares), of(rank=0, world_size=1))
    assert all(share.shape == (12 // world_size,) for share in shares)


@given(CHUNKS, SEEDS, st.integers(0, 100), st.integers(0, 100))
def test_steps_are_slices_of_one_sequence(rows_per_chunk, seed, first, count):
    sequence = samples(0, first + count, seed=seed, rows_per_chunk=rows_per_chunk)
    np.testing.assert_array_equal(samples(first, count, seed=seed, rows_per_chunk=rows_per_chunk), sequence[first:])


def test_consecutive_rows_come_from_one_window_of_chunks():
    chunks, size = 5 * WINDOW_CHUNKS, 100
    rows = samples(0, chunks * size, seed=1, rows_per_chunk=(size,) * chunks)
    for window in rows.reshape(5, -1):
        assert len(np.unique(window // size)) == WINDOW_CHUNKS


def test_seed_and_epoch_change_the_order():
    chunks = (50, 50, 50)
    first_seed, second_seed = (samples(0, 300, seed=seed, rows_per_chunk=chunks) for seed in (1, 2))
    assert not np.array_equal(first_seed, second_seed)
    assert not np.array_equal(first_seed[:150], first_seed[150:])


def test_the_order_is_the_same_on_every_platform():
    assert samples(0, 12, seed=32, rows_per_chunk=(5, 0, 4)).tolist() == [1, 7, 5, 6, 3, 8, 0, 4, 2, 2, 1, 5]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 3), (2, 2), (-1, 2)])
def test_a_rank_without_an_equal_share_is_refused(rank, world_size):
    with pytest.raises(ValueError, match="no equal share"):
        rows_of_step(0, seed=1, batch_size=4, rank=rank, world_size=world_size, rows_per_chunk=(9,))


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        rows_of_step(0, seed=1, batch_size=4, rank=0, world_size=1, rows_per_chunk=(0,))
