"""Memory for what is read again and again: in huge pages, where the system gives them.

Weights are streamed through at every step. In pages of 4 KB the translation of their addresses alone costs a part of
the bandwidth, and their first touch (a page fault each) more time than the reading of a checkpoint.
"""

from __future__ import annotations

import mmap
from typing import Final

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20
_ALIGNMENT: Final = 64
# An arena's pieces of memory, and the smallest tensors that get one of their own: their last pages count for little.
_CHUNK_BYTES: Final = 64 << 20
_LARGE_BYTES: Final = 16 << 20


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """`count` uninitialised elements, flat, 64-byte aligned; at a huge page's boundary if larger than one."""
    nbytes = count * dtype.itemsize
    if nbytes <= _HUGE_PAGE_BYTES:
        small = torch.empty(count + 64 // dtype.itemsize, dtype=dtype)
        offset = -small.data_ptr() % 64 // dtype.itemsize
        return small[offset : offset + count]
    # The slack is never touched, so it costs address space only.
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    storage = torch.frombuffer(memory, dtype=torch.uint8)
    offset = -storage.data_ptr() % _HUGE_PAGE_BYTES
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # The last, partly used page stays small: over many tensors its unused part would add up.
        memory.madvise(mmap.MADV_HUGEPAGE, offset, nbytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES)
    return storage[offset : offset + nbytes].view(dtype)


class Arena:
    """Memory for tensors that live about as long as each other, side by side, so that small ones share huge pages.

    A mixture's experts are a megabyte or two each: in pages of 4 KB, reading them took 1.2 to 1.5 times as long.

    Owns: where the next one begins. A chunk is given back with the last of its tensors.
    """

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """As the function of that name."""
        nbytes = count * dtype.itemsize
        if nbytes >= _LARGE_BYTES:
            return empty(count, dtype)
        taken = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if taken > len(self._left):
            self._left = empty(_CHUNK_BYTES, torch.uint8)
        piece, self._left = self._left[:nbytes], self._left[taken:]
        return piece.view(dtype)
