"""The memory of the KV cache's host tier, and the copies between it and the pool, beside the steps.

A block leaves in two moves: its pieces of all layers are gathered on the device, and go to its slot in one copy (copies
of neighbouring slots are one); it returns the same way. So the copy engine moves large pieces, and what the host gives
to the device does not grow with the layers.

Order. What leaves was written by steps that are finished, so it may leave while the step before is still running; the
step that overwrites it waits for that. What returns goes where the step before may still write, so it begins after
that one, goes on beside the next, and is waited for by the step after it, or by the next if that one needs it.

Owns: the slots' memory.
Never: decides what is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from penstock.messages import BlockCopy, SchedulerOutput
from penstock.runner.kv_pool import KVPool
from penstock.runner.staging import Backend, Event

# Pinned memory is given out in powers of two; a tier of pieces wastes little.
SLAB_NBYTES: Final = 1 << 30
STAGING_NBYTES: Final = 64 << 20


def staging_nbytes(block_nbytes: int) -> int:
    """On the device, where there is a host tier."""
    return max(STAGING_NBYTES // block_nbytes, 1) * block_nbytes


class HostBlocks:
    """num_slots slots of pinned memory, each with room for a block of `pool`."""

    def __init__(self, pool: KVPool, num_slots: int, backend: Backend) -> None:
        self._backend = backend
        self._blocks = pool.by_block()  # [B, pieces, words]
        shape = tuple(self._blocks.shape[1:])
        nbytes = shape[0] * shape[1] * 8
        self._slab_slots = max(SLAB_NBYTES // nbytes, 1)
        self._slabs = [
            backend.pinned((min(self._slab_slots, num_slots - first), *shape), torch.int64)
            for first in range(0, num_slots, self._slab_slots)
        ]
        num_staged = min(staging_nbytes(nbytes) // nbytes, num_slots)
        self._staging = torch.empty((num_staged, *shape), dtype=torch.int64, device=backend.device)
        self._before, self._now = backend.event(), backend.event()
        self._now.record()
        self._arriving: Event | None = None

    def begin(self, output: SchedulerOutput) -> None:
        """Gives a step's copies to the device. All earlier steps have been given to it, none of this one's work."""
        backend = self._backend
        if self._arriving is not None:
            self._arriving.wait()
            self._arriving = None
        self._before, self._now = self._now, self._before  # the ends of the step before the last, and of the last
        self._now.record()
        if output.offloads:
            backend.beside(partial(self._save, output.offloads), self._before).wait()
        if output.restores:
            self._arriving = backend.beside(partial(self._load, output.restores), self._now)
            if output.awaits_restores:
                self._arriving.wait()
                self._arriving = None

    def _save(self, copies: Sequence[BlockCopy]) -> None:
        for piece in self._pieces(copies):
            staging = self._staging[: len(piece)]
            torch.index_select(self._blocks, 0, self._send([copy.source for copy in piece]), out=staging)
            for begin, slots in self._runs([copy.destination for copy in piece]):
                self._backend.copy(slots, staging[begin : begin + len(slots)])

    def _load(self, copies: Sequence[BlockCopy]) -> None:
        for piece in self._pieces(copies):
            staging = self._staging[: len(piece)]
            for begin, slots in self._runs([copy.source for copy in piece]):
                self._backend.copy(staging[begin : begin + len(slots)], slots)
            self._blocks.index_copy_(0, self._send([copy.destination for copy in piece]), staging)

    def _pieces(self, copies: Sequence[BlockCopy]) -> Iterator[Sequence[BlockCopy]]:
        size = len(self._staging)
        return (copies[begin : begin + size] for begin in range(0, len(copies), size))

    def _runs(self, slots: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(place of the first, memory) of each run of neighbouring slots."""
        begin = 0
        for end in range(1, len(slots) + 1):
            first = slots[begin]
            is_over = end == len(slots) or slots[end] != slots[end - 1] + 1
            if is_over or slots[end] % self._slab_slots == 0:
                offset = first % self._slab_slots
                yield begin, self._slabs[first // self._slab_slots][offset : offset + end - begin]
                begin = end

    def _send(self, block_ids: Sequence[int]) -> Tensor:
        pinned = self._backend.pinned((len(block_ids),), torch.int64)
        pinned.copy_(torch.tensor(block_ids, dtype=torch.int64))
        sent = torch.empty(len(block_ids), dtype=torch.int64, device=self._backend.device)
        self._backend.copy(sent, pinned)
        return sent
