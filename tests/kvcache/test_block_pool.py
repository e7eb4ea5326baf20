"""Exact block ids in, exact block ids out."""

import pytest

from penstock.kvcache import BlockPool


def test_takes_the_lowest_ids_first_and_reuses_the_block_freed_last() -> None:
    pool = BlockPool(4)
    assert pool.take(3) == [0, 1, 2]
    pool.drop((0,))
    pool.drop((2,))
    assert pool.num_free == 3
    assert pool.take(3) == [2, 0, 3]
    assert pool.num_free == 0
    pool.check({0: 1, 1: 1, 2: 1, 3: 1})


def test_a_cached_block_stays_when_its_last_holder_leaves_and_is_free_when_evicted() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    pool.mark_cached((block,))
    pool.hold([block])
    pool.drop((block,))
    assert (pool.num_free, pool.num_available) == (1, 1)
    pool.drop((block,))
    assert (pool.num_free, pool.num_available, pool.num_cached) == (1, 2, 1)
    pool.hold([block])
    assert pool.num_available == 1
    pool.drop((block,))
    pool.evict(block)
    assert (pool.num_free, pool.num_available, pool.num_cached) == (2, 2, 0)
    pool.check({})


def test_taking_nothing_takes_nothing() -> None:
    pool = BlockPool(1)
    assert pool.take(0) == []
    assert pool.num_free == 1


def test_a_block_cannot_be_dropped_twice() -> None:
    pool = BlockPool(1)
    pool.take(1)
    pool.drop((0,))
    with pytest.raises(AssertionError, match="more often than held"):
        pool.drop((0,))


def test_check_names_the_block_whose_references_are_wrong() -> None:
    pool = BlockPool(2)
    pool.take(1)
    with pytest.raises(AssertionError, match="block 0: 1 references, 0 holders"):
        pool.check({})
