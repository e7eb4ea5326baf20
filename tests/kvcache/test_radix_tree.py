"""Matching, inserting and evicting, with exact node ids (a node's id is its block's)."""

import random

import pytest

from penstock.kvcache import BlockPool, RadixTree, encode_tokens
from penstock.kvcache.ordered_keys import OrderedKeys


def tree_of(num_blocks: int, block_size: int = 2) -> tuple[RadixTree, BlockPool]:
    pool = BlockPool(num_blocks)
    return RadixTree(pool, block_size), pool


def put(tree: RadixTree, pool: BlockPool, tokens: list[int], namespace: str = "") -> list[int]:
    """Inserts whole blocks as a request that starts, computes and ends would; returns the blocks it took."""
    root = tree.root(namespace)
    data = encode_tokens(tokens)
    path = tree.match(root, data)
    tree.hold(root, path)
    fresh = pool.take(len(tokens) // 2 - len(path))
    node = tree.insert(path[-1] if path else root, data[len(path) * 8 :], fresh)
    tree.release(node)
    return fresh


def test_match_follows_whole_blocks_and_ends_at_the_first_that_differs() -> None:
    tree, pool = tree_of(8)
    assert put(tree, pool, [1, 2, 3, 4, 5, 6]) == [0, 1, 2]
    root = tree.root("")
    assert tree.match(root, encode_tokens([1, 2, 3, 4, 5, 6, 7])) == [0, 1, 2]
    assert tree.match(root, encode_tokens([1, 2, 3, 4, 9, 6])) == [0, 1]
    assert tree.match(root, encode_tokens([1, 2, 3])) == [0]
    assert tree.match(root, encode_tokens([2, 1])) == []


def test_a_partial_match_finds_the_child_that_shares_most() -> None:
    tree, pool = tree_of(8, block_size=2)
    put(tree, pool, [1, 2])
    put(tree, pool, [1, 7])
    put(tree, pool, [3, 7])
    root = tree.root("")
    assert tree.match_partial(root, encode_tokens([1, 7])) == (1, 2)
    assert tree.match_partial(root, encode_tokens([3, 9])) == (2, 1)
    assert tree.match_partial(root, encode_tokens([3])) == (2, 1)
    assert tree.match_partial(root, encode_tokens([4, 7])) == (-1, 0)
    assert tree.match_partial(root, b"") == (-1, 0)
    assert tree.match_partial(2, encode_tokens([1])) == (-1, 0)


def test_namespaces_share_nothing_and_vanish_with_their_last_block() -> None:
    tree, pool = tree_of(4)
    put(tree, pool, [1, 2], "a")
    put(tree, pool, [1, 2], "b")
    assert tree.match(tree.root("a"), encode_tokens([1, 2])) == [0]
    assert tree.match(tree.root("b"), encode_tokens([1, 2])) == [1]
    assert tree.num_namespaces == 2
    assert tree.evict(1) == 1
    assert tree.num_namespaces == 1
    assert tree.match(tree.root("b"), encode_tokens([1, 2])) == [1]
    assert tree.evict(1) == 1
    assert tree.num_namespaces == 0
    tree.check({})


def test_eviction_takes_the_least_recently_released_leaf_and_never_a_parent_first() -> None:
    tree, pool = tree_of(5)
    put(tree, pool, [1, 2, 3, 4])  # 0 <- 1
    put(tree, pool, [5, 6])  # 2
    put(tree, pool, [1, 2, 7, 8])  # 0 <- 3, so 0 is younger than 2 now
    assert tree.evict(1) == 1
    assert not pool.is_cached(1)
    assert tree.evict(1) == 1
    assert not pool.is_cached(2)
    assert tree.evict(1) == 1
    assert not pool.is_cached(3)
    assert pool.is_cached(0)
    assert tree.evict(9) == 1
    assert pool.num_free == 5
    tree.check({})


def test_a_held_path_is_not_evicted() -> None:
    tree, pool = tree_of(4)
    put(tree, pool, [1, 2, 3, 4])
    put(tree, pool, [5, 6])
    root = tree.root("")
    path = tree.match(root, encode_tokens([1, 2, 3, 4]))
    tree.hold(root, path)
    assert tree.evict(9) == 1
    assert tree.match(root, encode_tokens([1, 2, 3, 4])) == [0, 1]
    tree.release(path[-1])
    assert tree.evict(9) == 2
    tree.check({})


def test_a_duplicate_stays_with_its_owner_and_the_node_is_held_for_it() -> None:
    tree, pool = tree_of(4)
    put(tree, pool, [1, 2])
    root = tree.root("")
    tree.hold(root, [])
    mine = pool.take(2)
    node = tree.insert(root, encode_tokens([1, 2, 3, 4]), mine)
    assert mine == [1, 2]
    assert node == 2
    assert tree.path(node) == (root, [0, 2])
    assert (pool.ref_count(0), pool.ref_count(1), pool.ref_count(2)) == (1, 1, 1)
    assert not pool.is_cached(1)


def test_tokens_that_are_no_32_bit_integers_are_refused() -> None:
    with pytest.raises(OverflowError):
        encode_tokens([1 << 31])
    with pytest.raises(TypeError):
        encode_tokens(["1"])  # type: ignore[list-item]


def test_ordered_keys_equal_a_sorted_list_through_thousands_of_changes() -> None:
    rng = random.Random(7)
    keys = OrderedKeys([b"m"])
    present = {b"m"}
    for _ in range(6000):
        key = rng.randbytes(rng.randint(1, 3))
        if key not in present:
            keys.add(key)
            present.add(key)
        elif len(present) > 1:
            keys.remove(key)
            present.remove(key)
    ordered = sorted(present)
    assert len(ordered) > 2000, "the test never split a chunk"
    assert keys.to_list() == ordered
    for _ in range(500):
        query = rng.randbytes(rng.randint(1, 4))
        above = [key for key in ordered if key >= query][:1]
        below = [key for key in ordered if key < query][-1:]
        assert sorted(keys.neighbours(query)) == sorted(above + below)
    for key in ordered[1:]:
        keys.remove(key)
    assert keys.to_list() == ordered[:1]
