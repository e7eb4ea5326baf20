"""Random sequences of operations on the manager, against a model that knows only sets of token prefixes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from penstock.config.engine import CacheConfig
from penstock.kvcache import BlockTable, KVCacheManager, encode_tokens
from token_prefixes import Prefix, draw_tokens, namespaces, tokens_of

BLOCK_SIZE = 2
NUM_BLOCKS = 9


@dataclass(eq=False)
class ModelRequest:
    """A live request: its table, its tokens, and what the model says of its blocks."""

    table: BlockTable
    namespace: str
    tokens: list[int]
    num_blocks: int
    num_inserted: int
    duplicates: set[Prefix] = field(default_factory=set)
    source: Prefix | None = None
    num_computed: int = 0
    snapshot: list[int] = field(default_factory=list)

    def held(self) -> set[Prefix]:
        path = {(self.namespace, tuple(self.tokens[: i * BLOCK_SIZE])) for i in range(1, self.num_inserted + 1)}
        return path | ({self.source} if self.source else set())

    def num_private(self) -> int:
        return self.num_blocks - self.num_inserted + len(self.duplicates)


class Model:
    """The cache as a dictionary from prefix to the time it was last released."""

    def __init__(self) -> None:
        self.released_at: dict[Prefix, int] = {}
        self.clock = 0
        self.live: list[ModelRequest] = []

    def num_free(self) -> int:
        return NUM_BLOCKS - len(self.released_at) - sum(request.num_private() for request in self.live)

    def held(self) -> set[Prefix]:
        return {prefix for request in self.live for prefix in request.held()}

    def num_available(self) -> int:
        return self.num_free() + len(set(self.released_at) - self.held())

    def match(self, namespace: str, tokens: list[int]) -> tuple[int, int]:
        """Whole blocks cached, and tokens shared with some block after them."""
        tokens = tokens[:-1]
        count = 0
        while (count + 1) * BLOCK_SIZE <= len(tokens) and (
            (namespace, tuple(tokens[: (count + 1) * BLOCK_SIZE])) in self.released_at
        ):
            count += 1
        partial = 0
        for name, prefix in self.released_at:
            if name == namespace and len(prefix) == (count + 1) * BLOCK_SIZE:
                shared = 0
                while shared < min(len(tokens), len(prefix)) and tokens[shared] == prefix[shared]:
                    shared += 1
                partial = max(partial, shared - count * BLOCK_SIZE)
        return count, partial

    def release(self, prefixes: set[Prefix]) -> None:
        self.clock += 1
        for prefix in prefixes:
            self.released_at[prefix] = self.clock

    def evict(self, count: int) -> None:
        for _ in range(count):
            held = self.held()
            parents = {(name, prefix[:-BLOCK_SIZE]) for name, prefix in self.released_at}
            leaves = [key for key in self.released_at if key not in held and key not in parents]
            del self.released_at[min(leaves, key=lambda key: self.released_at[key])]

    def make_room(self, num_blocks: int) -> None:
        self.evict(max(0, num_blocks - self.num_free()))

    def insert(self, request: ModelRequest, num_computed: int) -> None:
        for index in range(request.num_inserted, num_computed // BLOCK_SIZE):
            prefix = (request.namespace, tuple(request.tokens[: (index + 1) * BLOCK_SIZE]))
            if prefix in self.released_at:
                request.duplicates.add(prefix)
            else:
                self.released_at[prefix] = 0
            request.num_inserted = index + 1

    def reclaim(self, request: ModelRequest) -> None:
        others = {prefix for other in self.live if other is not request for prefix in other.held()}
        request.duplicates &= others

    def free(self, request: ModelRequest) -> None:
        if request.source is not None:
            self.release({request.source})
            request.source = None
        self.insert(request, request.num_computed)
        self.live.remove(request)
        self.release(request.held())


class KVCacheMachine(RuleBasedStateMachine):
    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVCacheManager(CacheConfig(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS))
        self.model = Model()

    @rule(target=requests, tokens=tokens_of, namespace=namespaces, num_spare=st.integers(0, 2))
    def start(self, tokens: list[int], namespace: str, num_spare: int) -> object:
        num_whole, num_partial = self.model.match(namespace, tokens)
        match = self.kv.match_prefix(encode_tokens(tokens), namespace)
        assert match.num_tokens == num_whole * BLOCK_SIZE + num_partial
        path = {(namespace, tuple(tokens[: i * BLOCK_SIZE])) for i in range(1, num_whole + 1)}
        source = self._prefix_of(match.source, namespace) if num_partial else None
        if source is not None:
            shared = tokens[: match.num_tokens]
            assert list(source[1][: match.num_tokens]) == shared, "the copied part differs"
        request = ModelRequest(BlockTable([], 0, 0, 0, 0), namespace, list(tokens), num_whole, num_whole, source=source)
        self.model.live.append(request)
        num_fresh = -(-len(tokens) // BLOCK_SIZE) - num_whole
        if self.model.num_available() < num_fresh + num_spare and source is not None:
            self.model.release({source})
            request.source = None
        expected = self.model.num_available() >= num_fresh + num_spare
        table = self.kv.allocate(match, len(tokens), num_spare)
        assert (table is not None) == expected
        if table is None:
            self.model.live.remove(request)
            self.model.release(path)
            return multiple()
        self.model.make_room(num_fresh)
        request.num_blocks += num_fresh
        request.table = table
        request.num_computed = table.num_cached_tokens
        request.snapshot = list(table.block_ids)
        return request

    def _prefix_of(self, block: int, namespace: str) -> Prefix:
        keys = [self.kv._tree._key[node] for node in self.kv._tree.path(block)[1]]
        data = b"".join(keys)
        return namespace, tuple(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4))

    @rule(request=requests, tokens=st.lists(st.integers(0, 1), max_size=4))
    def grow(self, request: ModelRequest, tokens: list[int]) -> None:
        if request not in self.model.live:
            return
        num_tokens = len(request.tokens) + len(tokens)
        num_fresh = max(0, -(-num_tokens // BLOCK_SIZE) - request.num_blocks)
        if self.model.num_available() < num_fresh:
            self.model.reclaim(request)
        expected = self.model.num_available() >= num_fresh
        assert expected or len(self.model.live) > 1 or num_tokens > NUM_BLOCKS * BLOCK_SIZE
        fresh = self.kv.grow(request.table, num_tokens)
        assert (fresh is not None) == expected
        if fresh is not None:
            assert len(fresh) == num_fresh
            self.model.make_room(num_fresh)
            request.num_blocks += num_fresh
            request.tokens += tokens
            request.snapshot += fresh

    @rule(request=requests, count=st.sampled_from([1, 2, 4, 10]))
    def compute(self, request: ModelRequest, count: int) -> None:
        """A step finishes some positions, and they are offered. Copies precede every step."""
        if request not in self.model.live:
            return
        self.take_copies()
        request.num_computed = min(len(request.tokens), request.num_computed + count)
        self.kv.insert(request.table, request.tokens, request.num_computed)
        self.model.insert(request, request.num_computed)

    @rule()
    def take_copies(self) -> None:
        copies = self.kv.take_copies()
        pending = [request for request in self.model.live if request.source is not None]
        assert [copy.destination for copy in copies] == [
            request.table.block_ids[request.num_inserted] for request in pending
        ]
        for request in pending:
            assert request.source is not None
            self.model.release({request.source})
            request.source = None

    @rule(request=consumes(requests))
    def free(self, request: ModelRequest) -> None:
        if request.source is not None:
            request.num_computed = 0  # the step that copies never ran
        self.kv.free(request.table, request.tokens, request.num_computed)
        self.model.free(request)

    @rule(tokens=tokens_of, namespace=namespaces)
    def look_up(self, tokens: list[int], namespace: str) -> None:
        """A match that is not used only counts as a use of what it found."""
        num_whole, num_partial = self.model.match(namespace, tokens)
        match = self.kv.match_prefix(encode_tokens(tokens), namespace)
        assert match.num_tokens == num_whole * BLOCK_SIZE + num_partial
        if num_partial:
            self.model.release({self._prefix_of(match.source, namespace)})
        self.model.release({(namespace, tuple(tokens[: i * BLOCK_SIZE])) for i in range(1, num_whole + 1)})
        self.kv.release(match)

    @rule(count=st.integers(1, 3))
    def evict(self, count: int) -> None:
        evictable = len(set(self.model.released_at) - self.model.held())
        assert self.kv.evict(count) == min(count, evictable)
        self.model.evict(min(count, evictable))

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.kv.check()
        stats = self.kv.stats()
        assert stats.num_free_blocks == self.model.num_free()
        assert stats.num_available_blocks == self.model.num_available()
        assert stats.num_cached_blocks == len(self.model.released_at)
        for request in self.model.live:
            assert request.table.block_ids == request.snapshot, "tables are append-only"
        for namespace, prefix in self.model.released_at:
            path = self.kv._tree.match(self.kv._tree.root(namespace), encode_tokens(prefix))
            assert len(path) * BLOCK_SIZE == len(prefix)

    def teardown(self) -> None:
        for request in list(self.model.live):
            self.kv.free(request.table, request.tokens, 0)
        self.kv.check()
        self.kv.evict(NUM_BLOCKS)
        assert self.kv.num_free == NUM_BLOCKS
        self.kv.check()


KVCacheMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestKVCache = KVCacheMachine.TestCase


@pytest.mark.parametrize("seed", range(4))
def test_a_long_walk(seed: int) -> None:
    """The same rules in thousands of steps: hypothesis finds small cases, this one deep states."""
    rng = random.Random(seed)
    machine = KVCacheMachine()
    replaced = 0
    replace = machine.kv._tree.replace

    def counting_replace(node: int, block_id: int) -> None:
        nonlocal replaced
        replaced += 1
        replace(node, block_id)

    machine.kv._tree.replace = counting_replace  # type: ignore[method-assign]
    for _ in range(3000):
        live = machine.model.live
        action = rng.random()
        if action < 0.3 or not live:
            machine.start(draw_tokens(rng), rng.choice(["", "", "tenant"]), rng.randrange(2))
        elif action < 0.6:
            machine.compute(rng.choice(live), rng.choice([1, 2, 10]))
        elif action < 0.75:
            machine.grow(rng.choice(live), [rng.randrange(2) for _ in range(rng.randint(1, 3))])
        elif action < 0.95:
            machine.free(rng.choice(live))
        elif action < 0.99:
            machine.look_up([0, 0, 0, 1, 1, 1, 0, 1][: rng.randint(1, 8)], "")
        else:
            machine.evict(rng.randint(1, 3))
        machine.agrees_with_the_model()
    machine.teardown()
    assert replaced > 0, "the walk never gave up a duplicate"
