"""The manager's contract, with exact block ids."""

from penstock.config.engine import CacheConfig
from penstock.kvcache import BlockTable, KVCacheManager, encode_tokens
from penstock.messages import BlockCopy


def manager_of(num_blocks: int, *, block_size: int = 4, caching: bool = True) -> KVCacheManager:
    return KVCacheManager(CacheConfig(block_size=block_size, num_blocks=num_blocks, enable_prefix_caching=caching))


def start(kv: KVCacheManager, tokens: list[int], namespace: str = "") -> BlockTable:
    table = kv.allocate(kv.match_prefix(encode_tokens(tokens), namespace), len(tokens))
    assert table is not None
    return table


def run(kv: KVCacheManager, tokens: list[int], namespace: str = "") -> BlockTable:
    """A request that computes all of its tokens and ends."""
    table = start(kv, tokens, namespace)
    kv.take_copies()
    kv.free(table, tokens, len(tokens))
    kv.check()
    return table


PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_first_request_gets_blocks_for_all_of_its_tokens() -> None:
    kv = manager_of(8)
    table = start(kv, PROMPT)
    assert table.block_ids == [0, 1, 2]
    assert table.num_cached_tokens == 0
    assert kv.take_copies() == []
    kv.check()
    assert (kv.num_free, kv.num_available) == (5, 5)


def test_a_finished_request_leaves_whole_blocks_cached_and_frees_the_rest() -> None:
    kv = manager_of(8)
    run(kv, PROMPT)
    stats = kv.stats()
    assert (stats.num_cached_blocks, stats.num_free_blocks, stats.num_available_blocks) == (2, 6, 8)


def test_the_same_prompt_hits_all_but_its_last_token() -> None:
    kv = manager_of(8)
    run(kv, [1, 2, 3, 4, 5, 6, 7, 8])
    table = start(kv, [1, 2, 3, 4, 5, 6, 7, 8])
    assert table.num_cached_tokens == 7
    assert table.block_ids == [0, 2]
    assert kv.take_copies() == [BlockCopy(1, 2)]
    assert kv.take_copies() == []
    kv.check()


def test_a_match_that_ends_inside_a_block_copies_it_into_a_fresh_one() -> None:
    kv = manager_of(8)
    run(kv, PROMPT)
    table = start(kv, [1, 2, 3, 4, 5, 6, 0, 0, 0, 0])
    assert table.num_cached_tokens == 6
    assert table.block_ids == [0, 2, 3]
    kv.check()
    assert kv.take_copies() == [BlockCopy(1, 2)]
    kv.check()


def test_a_copy_source_is_not_evicted_before_the_step_and_may_be_after_it() -> None:
    kv = manager_of(4)
    run(kv, [1, 2, 3, 4])
    table = start(kv, [1, 2, 9])
    assert (table.num_cached_tokens, table.block_ids) == (2, [1])
    assert kv.grow(table, 13) is None, "the fourth block is the source of the copy"
    assert kv.grow(table, 12) == [2, 3]
    assert kv.take_copies() == [BlockCopy(0, 1)]
    assert kv.grow(table, 13) == [0]
    kv.check()


def test_a_partial_match_is_given_up_when_holding_its_source_is_in_the_way() -> None:
    kv = manager_of(2)
    run(kv, [1, 2, 3, 4])
    table = start(kv, [1, 2, 5, 6, 7])
    assert table.num_cached_tokens == 0
    assert sorted(table.block_ids) == [0, 1]
    assert kv.take_copies() == []
    kv.check()


def test_ending_a_request_cancels_a_copy_that_no_step_made() -> None:
    kv = manager_of(4)
    run(kv, [1, 2, 3, 4])
    table = start(kv, [1, 2, 9])
    kv.free(table, [1, 2, 9], 0)
    kv.check()
    assert kv.take_copies() == []
    assert kv.num_available == 4


def test_allocation_leaves_the_spare_blocks_alone_and_releases_the_match_when_it_fails() -> None:
    kv = manager_of(4)
    run(kv, PROMPT)
    assert kv.allocate(kv.match_prefix(encode_tokens(PROMPT)), 9, num_spare=2) is None
    kv.check()
    assert kv.num_available == 4
    table = kv.allocate(kv.match_prefix(encode_tokens(PROMPT)), 9, num_spare=1)
    assert table is not None
    assert table.num_cached_tokens == 8
    assert kv.num_available == 1


def test_blocks_offered_while_running_can_be_hit_at_once() -> None:
    kv = manager_of(8)
    first = start(kv, PROMPT)
    kv.insert(first, PROMPT, 3)
    assert kv.match_prefix(encode_tokens(PROMPT)).num_tokens == 0
    kv.insert(first, PROMPT, 5)
    second = start(kv, PROMPT)
    assert second.num_cached_tokens == 4
    assert second.block_ids == [0, 3, 4]
    kv.check()


def test_a_duplicate_is_freed_with_its_request_and_the_first_block_stays() -> None:
    kv = manager_of(8)
    first, second = start(kv, PROMPT), start(kv, PROMPT)
    assert (first.block_ids, second.block_ids) == ([0, 1, 2], [3, 4, 5])
    kv.insert(first, PROMPT, 9)
    kv.insert(second, PROMPT, 9)
    assert second.block_ids == [3, 4, 5], "tables are append-only"
    kv.check()
    kv.free(first, PROMPT, 9)
    kv.check()
    assert kv.num_available == 3, "the second holds the cached blocks 0 and 1, and its own three"
    kv.free(second, PROMPT, 9)
    kv.check()
    assert (kv.num_free, kv.num_available) == (6, 8)
    assert kv.match_prefix(encode_tokens(PROMPT)).path == [0, 1]


def test_positions_that_were_not_computed_are_never_cached() -> None:
    kv = manager_of(8)
    table = start(kv, PROMPT)
    kv.free(table, PROMPT, 7)
    assert kv.match_prefix(encode_tokens(PROMPT)).num_tokens == 4


def test_a_table_grows_by_the_blocks_it_lacks() -> None:
    kv = manager_of(4)
    table = start(kv, [1, 2, 3])
    assert kv.grow(table, 4) == []
    assert kv.grow(table, 5) == [1]
    assert kv.grow(table, 17) is None
    assert table.block_ids == [0, 1]
    kv.check()


def test_namespaces_do_not_see_each_other() -> None:
    kv = manager_of(8)
    run(kv, PROMPT, "a")
    assert kv.match_prefix(encode_tokens(PROMPT), "b").num_tokens == 0
    assert kv.match_prefix(encode_tokens(PROMPT), "a").num_tokens == 8


def test_without_caching_nothing_matches_and_everything_is_freed() -> None:
    kv = manager_of(8, caching=False)
    run(kv, PROMPT)
    assert kv.num_free == 8
    assert start(kv, PROMPT).num_cached_tokens == 0


def test_an_empty_query_matches_nothing() -> None:
    kv = manager_of(8)
    run(kv, PROMPT)
    match = kv.match_prefix(b"")
    assert match.num_tokens == 0
    kv.release(match)
    kv.check()


def test_evict_frees_what_nobody_holds() -> None:
    kv = manager_of(8)
    run(kv, PROMPT)
    held = kv.match_prefix(encode_tokens([1, 2, 3, 4, 0]))
    assert kv.evict(8) == 1
    kv.release(held)
    assert kv.evict(8) == 1
    assert kv.num_free == 8
    assert kv.stats().num_evicted_blocks == 2
    kv.check()


def test_a_table_that_lacks_blocks_gives_up_what_it_holds_twice() -> None:
    kv = manager_of(6)
    first, second = start(kv, PROMPT), start(kv, PROMPT)
    kv.insert(first, PROMPT, 9)
    kv.insert(second, PROMPT, 9)
    assert kv.grow(second, 13) is None, "the first holds its blocks too"
    kv.free(first, PROMPT, 9)
    assert kv.grow(second, 24) == [1, 0, 2]
    assert second.block_ids == [3, 4, 5, 1, 0, 2]
    kv.check()
    match = kv.match_prefix(encode_tokens(PROMPT))
    assert match.path == [3, 4], "its own blocks are the cached ones now"
    kv.release(match)
    kv.free(second, PROMPT, 9)
    kv.check()
    assert kv.num_available == 6
