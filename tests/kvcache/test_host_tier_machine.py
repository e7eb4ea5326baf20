"""Random sequences of operations on a cache with a host tier, against memories that hold what was written to them.

A block's or slot's content is the prefix (namespace and tokens) whose keys and values it holds. So a wrong digest, a
slot given out twice or a copy at the wrong time shows as foreign content.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from penstock.config.engine import CacheConfig
from penstock.kvcache import BlockTable, KVCacheManager, encode_tokens
from penstock.kvcache.radix_tree import block_digest
from token_prefixes import Prefix, draw_tokens, namespaces, tokens_of

BLOCK_SIZE = 2
NUM_BLOCKS = 8
NUM_HOST_BLOCKS = 5


@dataclass(eq=False)
class Live:
    table: BlockTable
    namespace: str
    tokens: list[int]
    num_computed: int
    has_run: bool = False  # a step with its copies was launched
    is_over: bool = False

    def prefix(self, index: int) -> Prefix:
        return self.namespace, tuple(self.tokens[: (index + 1) * BLOCK_SIZE])


def digest_of(prefix: Prefix) -> bytes:
    """Computed anew, from the tokens alone."""
    namespace, tokens = prefix
    digest = block_digest(b"", namespace.encode())
    for begin in range(0, len(tokens), BLOCK_SIZE):
        digest = block_digest(digest, encode_tokens(tokens[begin : begin + BLOCK_SIZE]))
    return digest


class HostTierMachine(RuleBasedStateMachine):
    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        config = CacheConfig(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, num_host_blocks=NUM_HOST_BLOCKS)
        self.kv = KVCacheManager(config)
        self.device: dict[int, Prefix] = {}
        self.host: dict[int, Prefix] = {}
        self.live: list[Live] = []
        self.num_offloaded = self.num_restored = 0

    @rule(target=requests, tokens=tokens_of, namespace=namespaces, num_spare=st.integers(0, 1))
    def allocate(self, tokens: list[int], namespace: str, num_spare: int) -> object:
        match = self.kv.match_prefix(encode_tokens(tokens), namespace)
        assert match.num_tokens < len(tokens)
        hits = [
            (namespace, tuple(tokens[: (len(match.path) + index + 1) * BLOCK_SIZE])) for index in range(len(match.host))
        ]
        assert [digest_of(prefix) for prefix in hits] == match.host, "a hit in another place or namespace"
        assert not (match.host and match.source >= 0)
        table = self.kv.allocate(match, len(tokens), num_spare)
        if table is None:
            return multiple()
        assert table.num_host_tokens <= len(match.host) * BLOCK_SIZE
        assert table.num_cached_tokens <= match.num_tokens
        live = Live(table, namespace, list(tokens), table.num_cached_tokens)
        self.live.append(live)
        return live

    @rule()
    def launch(self) -> None:
        """A step: what leaves, what comes back, what is copied, in this order."""
        offloads, restores = self.kv.take_host_copies()
        assert len({copy.destination for copy in offloads}) == len(offloads)
        for copy in offloads:
            self.host[copy.destination] = self.device[copy.source]
        for copy in restores:
            self.device[copy.destination] = self.host.pop(copy.source)
        self.num_offloaded += len(offloads)
        self.num_restored += len(restores)
        for copy in self.kv.take_copies():
            self.device.pop(copy.destination, None)
        for live in self.live:
            live.has_run = True

    @rule(request=requests, count=st.sampled_from([1, 2, 4, 10]))
    def compute(self, request: Live, count: int) -> None:
        if request.is_over:
            return
        self.launch()
        begin, request.num_computed = request.num_computed, min(len(request.tokens), request.num_computed + count)
        for index in range(begin // BLOCK_SIZE, -(-request.num_computed // BLOCK_SIZE)):
            self.device.pop(request.table.block_ids[index], None)  # half-written
        for index in range(begin // BLOCK_SIZE, request.num_computed // BLOCK_SIZE):
            self.device[request.table.block_ids[index]] = request.prefix(index)
        self.kv.insert(request.table, request.tokens, request.num_computed)

    @rule(request=requests, tokens=st.lists(st.integers(0, 1), max_size=4))
    def grow(self, request: Live, tokens: list[int]) -> None:
        if not request.is_over and self.kv.grow(request.table, len(request.tokens) + len(tokens)) is not None:
            request.tokens += tokens

    @rule(request=consumes(requests))
    def finish_abort_or_preempt(self, request: Live) -> None:
        """At any time: also before the step that copies for it."""
        request.is_over = True
        self.live.remove(request)
        self.kv.free(
            request.table, request.tokens, request.num_computed if request.has_run else request.table.num_cached_tokens
        )

    @rule(tokens=tokens_of, namespace=namespaces)
    def look_up(self, tokens: list[int], namespace: str) -> None:
        self.kv.release(self.kv.match_prefix(encode_tokens(tokens), namespace))

    @rule(count=st.integers(1, 4))
    def evict(self, count: int) -> None:
        """With room on the host, what is evicted is found again to the last whole block."""
        room = NUM_HOST_BLOCKS - len(self.kv._host) - len(self.kv._host._claimed)
        found = {prefix: self.num_hit(prefix) for prefix in self.prefixes()}
        self.kv.evict(min(count, room))
        assert {prefix: self.num_hit(prefix) for prefix in found} == found, "a block was lost"

    def prefixes(self) -> list[Prefix]:
        return [prefix for block, prefix in self.device.items() if self.kv._pool.is_cached(block)]

    def num_hit(self, prefix: Prefix) -> int:
        match = self.kv.match_prefix(encode_tokens([*prefix[1], 9]), prefix[0])
        self.kv.release(match)
        return match.num_tokens // BLOCK_SIZE

    @invariant()
    def everything_is_where_it_is_said_to_be(self) -> None:
        self.kv.check()
        tree, pool, tier = self.kv._tree, self.kv._pool, self.kv._host
        for block in range(NUM_BLOCKS):
            if pool.is_cached(block):
                assert tree.digest(block) == digest_of(self.device[block])
        for digest, slot in tier._index.items():
            content = self.device[tier._offloads[slot]] if slot in tier._offloads else self.host[slot]
            assert digest == digest_of(content)
        stats = self.kv.stats()
        assert (stats.num_offloaded_blocks, stats.num_restored_blocks) == (self.num_offloaded, self.num_restored)
        assert stats.num_host_cached_blocks == len(tier) <= NUM_HOST_BLOCKS

    def teardown(self) -> None:
        for live in list(self.live):
            self.finish_abort_or_preempt(live)
        assert self.kv.num_available == NUM_BLOCKS
        self.kv.check()


HostTierMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHostTier = HostTierMachine.TestCase


@pytest.mark.parametrize("seed", range(3))
def test_a_long_walk(seed: int) -> None:
    rng = random.Random(seed)
    machine = HostTierMachine()
    for _ in range(1500):
        action, live = rng.random(), machine.live
        if action < 0.3 or not live:
            machine.allocate(draw_tokens(rng), rng.choice(["", "", "tenant"]), 0)
        elif action < 0.65:
            machine.compute(rng.choice(live), rng.choice([1, 2, 10]))
        elif action < 0.72:
            machine.grow(rng.choice(live), [rng.randrange(2) for _ in range(rng.randint(1, 3))])
        elif action < 0.95:
            machine.finish_abort_or_preempt(rng.choice(live))
        else:
            machine.evict(rng.randint(1, 3))
        machine.everything_is_where_it_is_said_to_be()
    assert machine.num_offloaded > 100
    assert machine.num_restored > 50
    assert machine.kv._host.num_dropped > 0
    machine.teardown()


def test_a_host_too_small_keeps_the_beginnings_of_prefixes() -> None:
    kv = KVCacheManager(CacheConfig(block_size=2, num_blocks=4, num_host_blocks=2))
    tokens = [1, 2, 3, 4, 5, 6, 7]
    table = kv.allocate(kv.match_prefix(encode_tokens(tokens)), len(tokens))
    assert table is not None
    kv.free(table, tokens, 6)
    assert kv.evict(4) == 3
    assert kv.match_prefix(encode_tokens(tokens)).num_tokens == 4
    assert kv.match_prefix(encode_tokens(tokens), "other").num_tokens == 0
