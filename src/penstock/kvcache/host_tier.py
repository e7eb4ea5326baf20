"""Which slots of the host's memory hold blocks that the device's prefix cache gave up."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.kvcache.radix_tree import block_digest
from penstock.messages.step import BlockCopy


class HostTier:
    """Slots 0..num_slots-1, each in exactly one of three states.

        free      holds nothing
        indexed   holds (or will, before the next step runs) the block of a digest; given up oldest first
        claimed   its block is on the way back to the device; nobody else finds it or takes its slot

    A block is here or on the device, never in both: it comes when the tree evicts it, and leaves when a request claims
    it or computes it again. A digest names a block's tokens, all tokens before them and their namespace (RadixTree.
    digest), so a block is found again whatever became of those before it. Leaves are evicted before their parents, so
    what is oldest here is what is deepest, and a prefix is lost from its end.
    """

    __slots__ = ("_claimed", "_free", "_index", "_offloads", "num_dropped", "num_slots")

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_dropped = 0  # blocks given up for want of room
        self._free = list(range(num_slots - 1, -1, -1))
        self._index: dict[bytes, int] = {}  # oldest first
        self._claimed: set[int] = set()
        self._offloads: dict[int, int] = {}  # slot -> block whose copy to it is not planned yet

    def __len__(self) -> int:
        return len(self._index)

    def match(self, parent: bytes, tokens: bytes, block_bytes: int) -> list[bytes]:
        """The digests of the whole blocks that `tokens` starts with and that are here; `parent`: of what precedes."""
        found: list[bytes] = []
        if not self._index:
            return found
        for end in range(block_bytes, len(tokens) + 1, block_bytes):
            parent = block_digest(parent, tokens[end - block_bytes : end])
            if parent not in self._index:
                break
            found.append(parent)
        return found

    def store(self, digest: bytes, block_id: int) -> bool:
        """Plans a copy of a block that the tree gives up; the oldest here makes room. False: every slot is claimed."""
        assert digest not in self._index
        if not self._free:
            if not self._index:
                return False
            self.discard(next(iter(self._index)))
            self.num_dropped += 1
        slot = self._free.pop()
        self._index[digest] = slot
        self._offloads[slot] = block_id
        return True

    def claim(self, digests: Iterable[bytes]) -> list[int]:
        """The slots of the first of these blocks, up to one that is not here (any more)."""
        slots: list[int] = []
        for digest in digests:
            slot = self._index.pop(digest, None)
            if slot is None:
                break
            slots.append(slot)
        self._claimed.update(slots)
        return slots

    def release(self, slots: Iterable[int]) -> None:
        """Ends a claim; the slots are free. The steps' order keeps what was planned to be read from them."""
        for slot in slots:
            self._claimed.remove(slot)
            self._offloads.pop(slot, None)
            self._free.append(slot)

    def discard(self, digest: bytes) -> None:
        """Gives a block up, if it is here."""
        slot = self._index.pop(digest, None)
        if slot is not None:
            self._offloads.pop(slot, None)
            self._free.append(slot)

    def take_offloads(self) -> list[BlockCopy]:
        """Copies from blocks to slots, to be made before the next step runs; once."""
        copies = [BlockCopy(block_id, slot) for slot, block_id in self._offloads.items()]
        self._offloads.clear()
        return copies

    def check(self, claimed: set[int], on_device: Iterable[bytes]) -> None:
        """Asserts every invariant. claimed: slots of tables being restored. on_device: digests that the tree holds."""
        free, indexed = set(self._free), set(self._index.values())
        assert len(free) == len(self._free)
        assert len(indexed) == len(self._index), "two blocks share a slot"
        assert self._claimed == claimed, "a claim was kept or lost"
        assert len(free) + len(indexed) + len(claimed) == self.num_slots
        assert free | indexed | claimed == set(range(self.num_slots))
        assert self._offloads.keys() <= indexed | claimed
        assert self._index.keys().isdisjoint(on_device), "a block is on the host and on the device"
