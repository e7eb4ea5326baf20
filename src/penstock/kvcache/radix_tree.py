"""The prefix tree: which block holds the keys and values of which tokens, after which prefix."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from heapq import heappop, heappush
from typing import Final

from penstock.kvcache.block_pool import BlockPool
from penstock.kvcache.ordered_keys import OrderedKeys

TOKEN_BYTES: Final = 4
_STAMP_SHIFT: Final = 32  # heap entries are stamp << 32 | node: one int, no tuple to build or to collect


def encode_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as bytes, TOKEN_BYTES each: what the tree compares and hashes.

    Raises TypeError or OverflowError for anything but integers of 32 bits.
    """
    return array("i", token_ids).tobytes()


def decode_tokens(tokens: bytes) -> list[int]:
    """The inverse of encode_tokens."""
    decoded = array("i")
    decoded.frombytes(tokens)
    return decoded.tolist()


def block_digest(parent: bytes, tokens: bytes) -> bytes:
    """32 bytes that name a block's tokens and, by the digest of the block before it (or of its root), all before."""
    return blake2b(parent + tokens, digest_size=32).digest()


class RadixTree:
    """Whole blocks of tokens, keyed by content, one root a namespace.

    A node is a block: the id of a node is the id of its block, and a node's data lies in parallel lists. So a tree of
    100,000 blocks adds nothing for the garbage collector to walk, and a lookup is one dict hit a block. Path
    compression would save dict hits (0.1 us a block) and cost splitting nodes under the feet of those who hold them;
    it does not pay. Roots are nodes without a block: their ids start at num_blocks. A root exists while it has
    children or holders.

    Holding: whoever holds a node holds all of its path, so a parent has at least its child's holders, and the blocks
    that nobody holds are closed downwards: each can be evicted, leaves first.

    Eviction: the least recently released leaf first. `_evictable` is a heap over leaves that nobody holds, with at most
    one entry a node. An entry's stamp may be older than its node's; it is then put back with the right one when it
    surfaces, and dropped when its node is held, has children (whoever ends that state pushes it again) or is in the
    tree no more. Since no entry is younger than its node, the first accurate one is the exact minimum.

    Pins: a pinned leaf that surfaces is put back as if just released, once a pin in a call, so that it goes when
    nothing else is left. What is above it stays anyway.

    Every operation costs O(blocks touched), times the logarithm of the tree for eviction and partial matches.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_bytes = block_size * TOKEN_BYTES
        num_blocks = pool.num_blocks
        self._num_blocks = num_blocks
        self._parent = [-1] * num_blocks
        self._key = [b""] * num_blocks
        self._children: list[dict[bytes, int] | None] = [None] * num_blocks
        self._order: dict[int, OrderedKeys] = {}  # only for nodes with several children
        self._released_at = [0] * num_blocks
        self._evictable: list[int] = []
        self._is_listed = bytearray(num_blocks)
        self._clock = 0
        self._digests = [b""] * num_blocks  # filled when asked for
        self._pinned: dict[int, float] = {}  # nodes that are evicted after all others, and until when
        self._roots: dict[str, int] = {}
        self._root_names: dict[int, str] = {}
        self._root_holders: dict[int, int] = {}
        self._spare_roots: list[int] = []
        self.depth = [0] * num_blocks  # blocks on the path down to and with this node; 0 for roots

    def root(self, namespace: str) -> int:
        """The root of a namespace, made if need be. It lasts while it has children or is held."""
        root = self._roots.get(namespace)
        if root is not None:
            return root
        if self._spare_roots:
            root = self._spare_roots.pop()
        else:
            root = len(self._parent)
            self._parent.append(-1)
            self._key.append(b"")
            self._children.append(None)
            self._released_at.append(0)
            self.depth.append(0)
        self._roots[namespace] = root
        self._root_names[root] = namespace
        self._root_holders[root] = 0
        return root

    def match(self, root: int, tokens: bytes) -> list[int]:
        """The path of nodes whose keys are the whole blocks that `tokens` starts with, top first. Changes nothing."""
        block_bytes = self._block_bytes
        children = self._children
        node = root
        path: list[int] = []
        for end in range(block_bytes, len(tokens) + 1, block_bytes):
            below = children[node]
            if below is None:
                break
            child = below.get(tokens[end - block_bytes : end])
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def match_partial(self, node: int, tokens: bytes) -> tuple[int, int]:
        """The child of `node` whose key shares the longest prefix with `tokens`, and how many tokens (at most a block).

        (-1, 0) when none shares any. Changes nothing.
        """
        below = self._children[node]
        if not below or not tokens:
            return -1, 0
        order = self._order.get(node)
        best, most = -1, 0
        for key in order.neighbours(tokens) if order is not None else below:
            shared = _shared_tokens(key, tokens)
            if shared > most:
                best, most = below[key], shared
        return best, most

    def hold(self, root: int, path: Sequence[int]) -> None:
        """One more holder for a root and a path that starts at it."""
        self._root_holders[root] += 1
        self._pool.hold(path)

    def release(self, node: int) -> list[int]:
        """One holder less for the path down to `node` (a root or not), which is now the most recently used.

        Returns the path, deepest first.
        """
        self._clock += 1
        stamp, released_at, parent = self._clock, self._released_at, self._parent
        path = []
        root = node
        while root < self._num_blocks:
            released_at[root] = stamp
            path.append(root)
            root = parent[root]
        self._pool.drop(path)
        self._root_holders[root] -= 1
        if path:
            self._list_if_evictable(node)
        else:
            self._remove_root_if_idle(root)
        return path

    def hold_leaf(self, node: int) -> None:
        """Holds one node alone, for somebody who holds the path above it and goes on to do so."""
        self._pool.hold((node,))

    def release_leaf(self, node: int) -> None:
        """Ends hold_leaf()."""
        self._clock += 1
        self._released_at[node] = self._clock
        self._pool.drop((node,))
        self._list_if_evictable(node)

    def insert(self, node: int, tokens: bytes, block_ids: Sequence[int]) -> int:
        """Extends the path that the caller holds down to `node` by whole blocks of `tokens`; returns its new end.

        block_ids: the caller's blocks with the keys and values of these tokens. Where the tree has such a block
        already, the caller's remains its own (a duplicate, in its table only) and the tree's is held as well. Else
        the caller's block becomes the node, and the caller's reference to it the node's first holder.
        """
        block_bytes, children = self._block_bytes, self._children
        parent, keys, depth = self._parent, self._key, self.depth
        assert len(tokens) == block_bytes * len(block_ids)
        added: list[int] = []
        for start, block_id in zip(range(0, len(tokens), block_bytes), block_ids, strict=True):
            key = tokens[start : start + block_bytes]
            below = children[node]
            child = below.get(key) if below is not None else None
            if child is not None:
                self._pool.hold((child,))
                node = child
                continue
            if below is None:
                children[node] = {key: block_id}
            else:
                self._add_sibling(node, below, key, block_id)
            parent[block_id], keys[block_id], depth[block_id] = node, key, depth[node] + 1
            added.append(block_id)
            node = block_id
        self._pool.mark_cached(added)
        return node

    def replace(self, node: int, block_id: int) -> None:
        """Puts `block_id` in the place of a node that only the caller holds, and which is free then. A pin is lost.

        block_id: the caller's duplicate of the node. Its one reference becomes the hold on the new node.
        """
        assert self._pool.ref_count(node) == 1
        parent, key, below = self._parent[node], self._key[node], self._children[node]
        siblings = self._children[parent]
        assert siblings is not None
        siblings[key] = block_id
        self._parent[block_id], self._key[block_id], self._children[block_id] = parent, key, below
        self.depth[block_id] = self.depth[node]
        for child in (below or {}).values():
            self._parent[child] = block_id
        if node in self._order:
            self._order[block_id] = self._order.pop(node)
        self._pinned.pop(node, None)
        self._parent[node], self._key[node], self._children[node] = -1, b"", None
        self._digests[block_id], self._digests[node] = self._digests[node], b""
        self._pool.mark_cached((block_id,))
        self._pool.drop((node,))
        self._pool.evict(node)

    def evict(self, num_blocks: int, on_evict: Callable[[int], None] | None = None) -> int:
        """Frees up to `num_blocks` blocks that nobody holds, least recently released leaves first; returns how many.

        on_evict: told of each node while it is still in the tree.
        """
        heap = self._evictable
        num_evicted = num_spared = 0
        while num_evicted < num_blocks and heap:
            entry = heappop(heap)
            node = entry & ((1 << _STAMP_SHIFT) - 1)
            self._is_listed[node] = 0
            if not self._pool.is_cached(node):
                continue
            if entry >> _STAMP_SHIFT != self._released_at[node]:
                self._list_if_evictable(node)
            elif self._children[node] is None and self._pool.ref_count(node) == 0:
                if node in self._pinned and num_spared < len(self._pinned):
                    num_spared += 1
                    self._clock += 1
                    self._released_at[node] = self._clock
                    self._list_if_evictable(node)
                    continue
                self._pinned.pop(node, None)
                if on_evict is not None:
                    on_evict(node)
                parent = self._parent[node]
                self._remove_child(parent, node)
                self._pool.evict(node)
                num_evicted += 1
                if parent >= self._num_blocks:
                    self._remove_root_if_idle(parent)
                else:
                    self._list_if_evictable(parent)
        return num_evicted

    def pin(self, node: int, until_s: float) -> None:
        """Has a node evicted after all that are not pinned, until `unpin` is called with the time of its last pin."""
        self._pinned[node] = max(until_s, self._pinned.get(node, until_s))

    def unpin(self, node: int, until_s: float) -> None:
        """Ends a pin, unless there is a later one."""
        if self._pinned.get(node) == until_s:
            del self._pinned[node]

    def pinned_until(self, node: int) -> float | None:
        return self._pinned.get(node)

    def path(self, node: int) -> tuple[int, list[int]]:
        """The root above `node`, and the path down to it, top first (without the root)."""
        path = []
        while node < self._num_blocks:
            path.append(node)
            node = self._parent[node]
        path.reverse()
        return node, path

    def parent(self, node: int) -> int:
        return self._parent[node]

    def digest(self, node: int) -> bytes:
        """Names the content of a node (or root): its namespace and all tokens down to it. See block_digest."""
        lacking: list[int] = []
        while node < self._num_blocks and not self._digests[node]:
            lacking.append(node)
            node = self._parent[node]
        digest = self._digests[node] if node < self._num_blocks else block_digest(b"", self._root_names[node].encode())
        for below in reversed(lacking):
            digest = self._digests[below] = block_digest(digest, self._key[below])
        return digest

    def digests(self) -> Iterable[bytes]:
        """Of all nodes."""
        return (self.digest(node) for node in range(self._num_blocks) if self._pool.is_cached(node))

    @property
    def num_namespaces(self) -> int:
        return len(self._roots)

    def _add_sibling(self, node: int, below: dict[bytes, int], key: bytes, child: int) -> None:
        """Adds a child to a node that has some, which are `below`."""
        below[key] = child
        order = self._order.get(node)
        if order is None:
            self._order[node] = OrderedKeys(list(below))
        else:
            order.add(key)

    def _remove_child(self, node: int, child: int) -> None:
        below = self._children[node]
        assert below is not None
        key = self._key[child]
        del below[key]
        if not below:
            self._children[node] = None
            self._order.pop(node, None)
        else:
            self._order[node].remove(key)
        self._key[child] = b""
        self._digests[child] = b""
        self._parent[child] = -1

    def _list_if_evictable(self, node: int) -> None:
        if not self._is_listed[node] and self._children[node] is None and self._pool.ref_count(node) == 0:
            self._is_listed[node] = 1
            heappush(self._evictable, self._released_at[node] << _STAMP_SHIFT | node)

    def _remove_root_if_idle(self, root: int) -> None:
        if self._children[root] is None and self._root_holders[root] == 0:
            del self._roots[self._root_names.pop(root)], self._root_holders[root]
            self._spare_roots.append(root)

    def check(self, root_holders: dict[int, int]) -> None:
        """Asserts the tree's invariants. root_holders: how many hold each root (by id)."""
        assert set(self._roots.values()) == set(self._root_names) == set(self._root_holders)
        seen: set[int] = set()
        stack = list(self._roots.values())
        for root in stack:
            assert self._root_holders[root] == root_holders.get(root, 0)
            assert self._root_holders[root] or self._children[root], "an idle root was kept"
        while stack:
            node = stack.pop()
            below = self._children[node] or {}
            order = self._order.get(node)
            assert order is not None if len(below) > 1 else True
            assert order is None or order.to_list() == sorted(below)
            for key, child in below.items():
                self._check_child(node, key, child)
                assert child not in seen
                seen.add(child)
                stack.append(child)
        assert seen == {block for block in range(self._num_blocks) if self._pool.is_cached(block)}
        assert self._pinned.keys() <= seen
        self._check_heap(seen)

    def _check_child(self, node: int, key: bytes, child: int) -> None:
        assert len(key) == self._block_bytes
        assert self._key[child] == key
        assert self._parent[child] == node
        assert self.depth[child] == self.depth[node] + 1
        if node < self._num_blocks:
            assert self._pool.ref_count(node) >= self._pool.ref_count(child), (
                "a child has holders that its parent lacks"
            )

    def _check_heap(self, nodes: set[int]) -> None:
        listed = [entry & ((1 << _STAMP_SHIFT) - 1) for entry in self._evictable]
        assert len(set(listed)) == len(listed)
        assert set(listed) == {node for node in range(self._num_blocks) if self._is_listed[node]}
        for entry, node in zip(self._evictable, listed, strict=True):
            assert entry >> _STAMP_SHIFT <= self._released_at[node]
        for node in nodes:
            if self._children[node] is None and self._pool.ref_count(node) == 0:
                assert self._is_listed[node], f"leaf {node} could never be evicted"
        for index, entry in enumerate(self._evictable[1:], start=1):
            assert self._evictable[(index - 1) // 2] < entry, "not a heap"


def _shared_tokens(left: bytes, right: bytes) -> int:
    """How many whole tokens two byte strings have in common at their start."""
    length = min(len(left), len(right))
    difference = int.from_bytes(left[:length], "little") ^ int.from_bytes(right[:length], "little")
    if difference == 0:
        return length // TOKEN_BYTES
    return ((difference & -difference).bit_length() - 1) // (8 * TOKEN_BYTES)
