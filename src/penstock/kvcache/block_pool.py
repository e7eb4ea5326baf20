"""The fixed set of KV cache blocks: which are free, who holds the others, which are cached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BlockPool:
    """Block ids 0..num_blocks-1, each in exactly one of three states.

        free                 not held, not in the tree; on the free list
        referenced           held by at least one request (in the tree or not)
        cached-unreferenced  in the tree, held by nobody; evictable

    so that free + referenced + cached-unreferenced == num_blocks, always. Every operation is O(1) a block.
    The free list is a stack: the block freed last is taken first, while the CPU's caches still know it.
    """

    __slots__ = ("_free", "_is_cached", "_ref_counts", "num_blocks", "num_cached", "num_unreferenced")

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 0
        self.num_blocks = num_blocks
        self.num_cached = 0
        self.num_unreferenced = 0  # cached and held by nobody
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks
        self._is_cached = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that a request could get now: free ones, and cached ones that nobody holds."""
        return len(self._free) + self.num_unreferenced

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def is_cached(self, block_id: int) -> bool:
        return bool(self._is_cached[block_id])

    def take(self, num_blocks: int) -> list[int]:
        """Free blocks, now held once each. The caller has made sure that there are enough."""
        assert num_blocks <= len(self._free)
        if num_blocks == 0:
            return []
        taken = self._free[: -num_blocks - 1 : -1]
        del self._free[-num_blocks:]
        ref_counts = self._ref_counts
        for block_id in taken:
            ref_counts[block_id] = 1
        return taken

    def hold(self, block_ids: Iterable[int]) -> None:
        """One more holder for each of these cached or held blocks."""
        ref_counts = self._ref_counts
        num_claimed = 0
        for block_id in block_ids:
            if ref_counts[block_id] == 0:
                num_claimed += 1
            ref_counts[block_id] += 1
        self.num_unreferenced -= num_claimed

    def drop(self, block_ids: Iterable[int]) -> None:
        """One holder less for each of these blocks. The last one frees a block, unless the tree keeps it."""
        ref_counts, is_cached = self._ref_counts, self._is_cached
        for block_id in block_ids:
            ref_counts[block_id] = count = ref_counts[block_id] - 1
            if count:
                assert count > 0, f"block {block_id} dropped more often than held"
            elif is_cached[block_id]:
                self.num_unreferenced += 1
            else:
                self._free.append(block_id)

    def mark_cached(self, block_ids: Sequence[int]) -> None:
        """The tree takes these blocks in, while a request still holds them."""
        ref_counts, is_cached = self._ref_counts, self._is_cached
        for block_id in block_ids:
            assert ref_counts[block_id] > 0
            assert not is_cached[block_id]
            is_cached[block_id] = 1
        self.num_cached += len(block_ids)

    def evict(self, block_id: int) -> None:
        """The tree gives this block up; nobody holds it."""
        assert self._is_cached[block_id]
        assert self._ref_counts[block_id] == 0
        self._is_cached[block_id] = 0
        self.num_cached -= 1
        self.num_unreferenced -= 1
        self._free.append(block_id)

    def check(self, holders: dict[int, int]) -> None:
        """Asserts every invariant. holders: for each held block, how many holders it must have."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice on the free list"
        num_referenced = num_unreferenced = 0
        for block_id in range(self.num_blocks):
            count = self._ref_counts[block_id]
            assert count == holders.get(block_id, 0), (
                f"block {block_id}: {count} references, {holders.get(block_id, 0)} holders"
            )
            is_idle_and_cached = count == 0 and bool(self._is_cached[block_id])
            assert (block_id in free) == (count == 0 and not is_idle_and_cached), (
                f"block {block_id} is in two states or none"
            )
            num_referenced += count > 0
            num_unreferenced += is_idle_and_cached
        assert num_unreferenced == self.num_unreferenced
        assert sum(self._is_cached) == self.num_cached
        assert len(free) + num_referenced + num_unreferenced == self.num_blocks
