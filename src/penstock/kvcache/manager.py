"""The one writer of block tables: what of a prompt is cached, which blocks a request gets, what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import msgspec

from penstock.config.engine import CacheConfig
from penstock.kvcache.block_pool import BlockPool
from penstock.kvcache.host_tier import HostTier
from penstock.kvcache.radix_tree import TOKEN_BYTES, RadixTree, encode_tokens
from penstock.messages.step import BlockCopy

_NO_NODE = -1


class KVCacheStats(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """num_cached_blocks: blocks in the tree, held or not. num_available_blocks: free, or cached and held by nobody.

    num_evicted_blocks, num_copies, num_offloaded_blocks and num_restored_blocks count from the start. num_host_*: slots
    of the host tier, and those that hold a block.
    """

    num_blocks: int
    num_free_blocks: int
    num_available_blocks: int
    num_cached_blocks: int
    num_evicted_blocks: int
    num_copies: int
    num_host_blocks: int
    num_host_cached_blocks: int
    num_offloaded_blocks: int
    num_restored_blocks: int


class PrefixMatch:
    """The cached start of a token sequence. Held, so it cannot be evicted, until allocate() or release() takes it.

    num_tokens: cached tokens, to the token: len(path) whole blocks, len(host) blocks of the host tier after them, and
    the rest at the start of block `source`. host_tokens: of the blocks in `host`, which are not held.
    """

    __slots__ = ("host", "host_tokens", "num_tokens", "path", "root", "source")

    def __init__(self, root: int, path: list[int], num_tokens: int, source: int) -> None:
        self.root = root
        self.path = path
        self.num_tokens = num_tokens
        self.source = source
        self.host: list[bytes] = []
        self.host_tokens = b""

    @property
    def node(self) -> int:
        return self.path[-1] if self.path else self.root


class BlockTable:
    """The blocks of one running request; read-only outside this package, and append-only while the request runs.

    block_ids[i] holds positions [i * block_size, (i + 1) * block_size). num_cached_tokens: those that were found cached
    at allocation, num_host_tokens of these in the host tier. num_inserted_blocks: leading blocks that the tree knows;
    insert_at: so many computed tokens fill one more.
    """

    __slots__ = (
        "block_ids", "copy_source", "insert_at", "node", "num_cached_tokens", "num_host_tokens", "num_inserted_blocks",
    )  # fmt: skip

    def __init__(
        self, block_ids: list[int], node: int, num_cached_tokens: int, num_inserted_blocks: int, insert_at: int
    ) -> None:
        self.block_ids = block_ids
        self.node = node
        self.num_cached_tokens = num_cached_tokens
        self.num_inserted_blocks = num_inserted_blocks
        self.insert_at = insert_at
        self.num_host_tokens = 0
        self.copy_source = _NO_NODE


class _Restore(NamedTuple):
    """Blocks on their way from the host: their slots, and the tokens that they hold."""

    slots: list[int]
    tokens: bytes


class KVCacheManager:
    """Gives requests blocks, keeps what they computed, and finds it again for others.

    The regions of a running request's tokens, and who owns the blocks below them (block size 16):

        tokens  |<------ cached ------>|<- copied ->|<---------- computed ---------->|<-- new -->|<- slack ->|
        blocks  [   0   ]  [  k - 1   ]  [     k      ]  [ k + 1 ]  ...      [ m - 1 ]  [   m   ] ... [ n - 1 ]
        tree    |<-- found there ----->|<---- offered by insert() as they fill ------>|<---- not in the tree ---->|

        cached    whole blocks found in the tree; shared, never written, held along the path from the root
        copied    the match ended inside a block: its first tokens are copied into the fresh block k before the
                  step runs (BlockCopy), so that a hit is exact to the token and no shared block is ever written
        computed  written by steps that have finished; insert() offers every whole block of these to the tree
        new       positions that the step being planned, or one in flight, writes
        slack     allocated, not written: the rest of the prompt while it is prefilled in chunks, or the rest
                  of the last block

    Only positions of finished steps are ever offered. Writing is not the reason: steps execute one after the other in
    the order of their launch, so a block written in step N could be read in step N + 1 even while N is in flight.
    Failing is: when step N reports an error for a request, what it wrote for it is not to be trusted, and by then N +
    1 would have read it. The price is that a prefix can be hit one step later.

    The same order of execution makes it safe to free a block at once although a step in flight still writes it:
    whoever gets the block next writes it in a later step. And what is in flight is beyond what insert() was offered,
    so such a late write never lands in a cached block.

    Two requests that computed the same block: the first to offer it owns the node. The other keeps its duplicate in its
    table, which is append-only, holds the tree's block too, and free() returns the duplicate. Should such a table lack
    blocks, its duplicates take the place of nodes that nobody else holds (any more).

    The host tier (config.num_host_blocks): what the tree evicts is copied to a slot of the host's memory before the
    step that overwrites it, and copied back into fresh blocks of the next request that begins alike. It is in the tree
    from the moment that this copy is planned: whoever hits it runs in a later step, and the runner makes that one wait.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.block_size = config.block_size
        self.num_blocks = config.num_blocks
        self.enable_prefix_caching = config.enable_prefix_caching
        self._block_bytes = config.block_size * TOKEN_BYTES
        self._pool = BlockPool(config.num_blocks)
        self._tree = RadixTree(self._pool, config.block_size)
        self._matches: set[PrefixMatch] = set()
        self._tables: set[BlockTable] = set()
        self._host = HostTier(config.num_host_blocks if config.enable_prefix_caching else 0)
        self._on_evict = self._offload if self._host.num_slots else None
        self._copying: list[tuple[BlockTable, BlockCopy]] = []
        self._restoring: dict[BlockTable, _Restore] = {}
        self._pins: list[tuple[float, int]] = []  # a heap of what was pinned, by its end
        self._num_evicted = 0
        self._num_copies = 0
        self._num_offloaded = 0
        self._num_restored = 0

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_available(self) -> int:
        """Blocks that allocate() could hand out now, by evicting if need be."""
        return self._pool.num_available

    @property
    def num_tables(self) -> int:
        return len(self._tables)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, tokens: bytes, namespace: str = "") -> PrefixMatch:
        """The longest cached prefix of `tokens` (of encode_tokens) in a namespace, to the token, and held.

        The last token never counts as cached: computing it is what gives the next one. No tokens match nothing.
        """
        tree = self._tree
        root = tree.root(namespace)
        path: list[int] = []
        host: list[bytes] = []
        source, num_tokens, end = _NO_NODE, 0, 0
        limit = len(tokens) - TOKEN_BYTES
        if self.enable_prefix_caching and limit > 0:
            path = tree.match(root, tokens[:limit])
            end = len(path) * self._block_bytes
            node, num_partial = path[-1] if path else root, 0
            if self._host:
                host = self._host.match(tree.digest(node), tokens[end:limit], self._block_bytes)
            if not host:
                source, num_partial = tree.match_partial(node, tokens[end : min(end + self._block_bytes, limit)])
            num_tokens = (len(path) + len(host)) * self.block_size + num_partial
        tree.hold(root, path)
        if source != _NO_NODE:
            tree.hold_leaf(source)
        match = PrefixMatch(root, path, num_tokens, source)
        if host:
            match.host, match.host_tokens = host, tokens[end : end + len(host) * self._block_bytes]
        self._matches.add(match)
        return match

    def release(self, match: PrefixMatch) -> None:
        """Lets go of a match that is not going to be used."""
        self._matches.remove(match)
        self._drop_source(match)
        self._tree.release(match.node)

    def allocate(self, match: PrefixMatch, num_tokens: int, num_spare: int = 0) -> BlockTable | None:
        """A table for `num_tokens` tokens that starts with the match; takes the match over in any case.

        None, and nothing changed, unless `num_spare` blocks remain available beyond it. A partial block at the
        match's end is given up first: holding its source can be what is in the way.
        """
        num_fresh = self.blocks_for(num_tokens) - len(match.path)
        assert num_fresh > 0 or num_tokens == 0, "the last token is always computed"
        if self._pool.num_available < num_fresh + num_spare:
            self._drop_source(match)
            if self._pool.num_available < num_fresh + num_spare:
                self.release(match)
                return None
        self._matches.remove(match)
        slots = self._host.claim(match.host)
        if len(slots) < len(match.host):  # evicted since
            match.num_tokens = (len(match.path) + len(slots)) * self.block_size
        fresh = self._take(num_fresh)
        num_found = len(match.path)
        insert_at = (num_found + 1) * self.block_size
        table = BlockTable(match.path + fresh, match.node, match.num_tokens, num_found, insert_at)
        if slots:
            table.num_host_tokens = len(slots) * self.block_size
            self._restoring[table] = _Restore(slots, match.host_tokens[: len(slots) * self._block_bytes])
        if match.source != _NO_NODE:
            table.copy_source = match.source
            self._copying.append((table, BlockCopy(match.source, fresh[0])))
        self._tables.add(table)
        return table

    def grow(self, table: BlockTable, num_tokens: int) -> list[int] | None:
        """Appends blocks until the table holds `num_tokens` tokens; returns the new ids.

        None if there are too few. That cannot happen to a table alone in the pool, if its blocks fit there.
        """
        num_fresh = self.blocks_for(num_tokens) - len(table.block_ids)
        if num_fresh <= 0:
            return []
        if self._pool.num_available < num_fresh:
            self._reclaim_duplicates(table)
            if self._pool.num_available < num_fresh:
                return None
        fresh = self._take(num_fresh)
        table.block_ids += fresh
        return fresh

    def insert(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Offers the table's whole blocks below position `num_computed` to the tree, for others to hit.

        token_ids: the request's tokens from position 0. num_computed: positions that finished steps have written.
        """
        first, last = table.num_inserted_blocks, num_computed // self.block_size
        if last <= first or not self.enable_prefix_caching:
            return
        self._insert(table, encode_tokens(token_ids[first * self.block_size : last * self.block_size]))

    def free(
        self,
        table: BlockTable,
        token_ids: Sequence[int],
        num_computed: int,
        pins: Sequence[tuple[int, float]] = (),
        now: float = 0.0,
    ) -> None:
        """Ends a table: what it computed stays cached until evicted, all else is free at once.

        pins: (leading tokens, seconds): their whole blocks are evicted after all that is not pinned, so long from now.
        Pinned blocks count as available: a pin never keeps a request out.
        """
        self._tables.remove(table)
        if table.copy_source != _NO_NODE:
            self._cancel_copy(table)
        if table in self._restoring:  # it ended before the step that would restore them was launched
            self._host.release(self._restoring.pop(table).slots)
            num_computed = table.num_inserted_blocks * self.block_size
        self.insert(table, token_ids, num_computed)
        for num_tokens, ttl_s in pins:
            self._pin_tokens(table, num_tokens, now + ttl_s)
        self._expire_pins(now)
        # Deepest first, so that the free list hands the blocks out again in the table's order.
        path = self._tree.release(table.node)
        blocks = table.block_ids[::-1]
        num_others = len(blocks) - len(path)
        self._pool.drop(blocks[:num_others])
        del blocks[:num_others]
        if blocks != path:
            self._pool.drop([block for block, node in zip(blocks, path, strict=True) if block != node])  # duplicates

    def take_copies(self) -> list[BlockCopy]:
        """The copies that the next step must make before it computes, once.

        Their sources are held until now: no allocation of the same step can have reused one. Steps to come may.
        """
        if not self._copying:
            return []
        copies = []
        for table, copy in self._copying:
            copies.append(copy)
            self._tree.release_leaf(table.copy_source)
            table.copy_source = _NO_NODE
        self._copying.clear()
        self._num_copies += len(copies)
        return copies

    def take_host_copies(self) -> tuple[list[BlockCopy], list[BlockCopy]]:
        """From blocks to slots of the host tier, then from slots to blocks: before all else of the next step, once."""
        if not self._host.num_slots:
            return [], []
        offloads = self._host.take_offloads()
        restores: list[BlockCopy] = []
        for table, restore in self._restoring.items():
            first = table.num_inserted_blocks
            restores += map(BlockCopy, restore.slots, table.block_ids[first : first + len(restore.slots)])
            self._insert(table, restore.tokens)
            self._host.release(restore.slots)
        self._restoring.clear()
        self._num_offloaded += len(offloads)
        self._num_restored += len(restores)
        return offloads, restores

    def evict(self, num_blocks: int) -> int:
        """Frees up to `num_blocks` cached blocks that nobody holds, the least recently used first; returns how many."""
        num_evicted = self._tree.evict(num_blocks, self._on_evict)
        self._num_evicted += num_evicted
        return num_evicted

    def stats(self) -> KVCacheStats:
        pool = self._pool
        return KVCacheStats(
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_available_blocks=pool.num_available,
            num_cached_blocks=pool.num_cached,
            num_evicted_blocks=self._num_evicted,
            num_copies=self._num_copies,
            num_host_blocks=self._host.num_slots,
            num_host_cached_blocks=len(self._host),
            num_offloaded_blocks=self._num_offloaded,
            num_restored_blocks=self._num_restored,
        )

    def check(self) -> None:
        """Asserts every invariant: three states partition the blocks, references equal holders, the tree is sound."""
        holders: dict[int, int] = {}
        root_holders: dict[int, int] = {}
        held: list[int] = []
        for match in self._matches:
            root_holders[match.root] = root_holders.get(match.root, 0) + 1
            held += match.path
            if match.source != _NO_NODE:
                held.append(match.source)
        for table in self._tables:
            root, path = self._tree.path(table.node)
            assert len(path) == table.num_inserted_blocks == self._tree.depth[table.node]
            assert table.insert_at == (table.num_inserted_blocks + 1) * self.block_size
            assert len(set(table.block_ids)) == len(table.block_ids), "a block is twice in a table"
            root_holders[root] = root_holders.get(root, 0) + 1
            held += path
            held += [block for index, block in enumerate(table.block_ids) if index >= len(path) or block != path[index]]
            if table.copy_source != _NO_NODE:
                held.append(table.copy_source)
        for block in held:
            holders[block] = holders.get(block, 0) + 1
        assert {table for table, _ in self._copying} == {
            table for table in self._tables if table.copy_source != _NO_NODE
        }
        self._pool.check(holders)
        self._tree.check(root_holders)
        private = [block for table in self._tables for block in table.block_ids if not self._pool.is_cached(block)]
        assert len(set(private)) == len(private), "two tables share a block that may be written"
        assert self._restoring.keys() <= self._tables
        claimed = {slot for restore in self._restoring.values() for slot in restore.slots}
        self._host.check(claimed, self._tree.digests() if self._host else ())

    def _insert(self, table: BlockTable, tokens: bytes) -> None:
        """Offers the table's next whole blocks, which hold `tokens`, to the tree; the host tier gives them up."""
        first = table.num_inserted_blocks
        last = first + len(tokens) // self._block_bytes
        table.node = node = self._tree.insert(table.node, tokens, table.block_ids[first:last])
        table.num_inserted_blocks, table.insert_at = last, (last + 1) * self.block_size
        if self._host:
            for _ in range(last - first):
                self._host.discard(self._tree.digest(node))
                node = self._tree.parent(node)

    def _offload(self, node: int) -> None:
        self._host.store(self._tree.digest(node), node)

    def _take(self, num_blocks: int) -> list[int]:
        missing = num_blocks - self._pool.num_free
        if missing > 0:
            num_evicted = self.evict(missing)
            assert num_evicted == missing, "a block that nobody holds could not be evicted"
        return self._pool.take(num_blocks)

    def _reclaim_duplicates(self, table: BlockTable) -> None:
        """Frees the tree's blocks that the table holds beside its own with the same content, where nobody else does."""
        for index, node in enumerate(self._tree.path(table.node)[1]):
            block_id = table.block_ids[index]
            if block_id != node and self._pool.ref_count(node) == 1:
                until_s = self._tree.pinned_until(node)
                self._tree.replace(node, block_id)
                if until_s is not None:
                    self._pin(block_id, until_s)
                if table.node == node:
                    table.node = block_id

    def _pin_tokens(self, table: BlockTable, num_tokens: int, until_s: float) -> None:
        node = table.node
        depth = min(num_tokens // self.block_size, table.num_inserted_blocks)
        for _ in range(table.num_inserted_blocks - depth):
            node = self._tree.parent(node)
        if depth > 0:
            self._pin(node, until_s)

    def _pin(self, node: int, until_s: float) -> None:
        self._tree.pin(node, until_s)
        heappush(self._pins, (until_s, node))

    def _expire_pins(self, now: float) -> None:
        while self._pins and self._pins[0][0] <= now:
            until_s, node = heappop(self._pins)
            self._tree.unpin(node, until_s)

    def _drop_source(self, match: PrefixMatch) -> None:
        if match.source != _NO_NODE:
            self._tree.release_leaf(match.source)
            match.source = _NO_NODE
            match.num_tokens = len(match.path) * self.block_size

    def _cancel_copy(self, table: BlockTable) -> None:
        """The request ended before the step that would copy for it was launched."""
        self._copying = [entry for entry in self._copying if entry[0] is not table]
        self._tree.release_leaf(table.copy_source)
        table.copy_source = _NO_NODE
