"""Memory for what is read again and again: in huge pages, where the system gives them.

Weights are streamed through at every step. In pages of 4 KB the translation of their addresses alone costs a part of
the bandwidth, and their first touch (a page fault each) more time than the reading of a checkpoint.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """`count` uninitialised elements, flat, 64-byte aligned; at a huge page's boundary if larger than one."""
    nbytes = count * dtype.itemsize
    if nbytes <= _HUGE_PAGE_BYTES:
        return _aligned(torch.empty(count + 64 // dtype.itemsize, dtype=dtype), count, 64)
    # The slack is never touched, so it costs address space only.
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return _aligned(torch.frombuffer(memory, dtype=dtype), count, _HUGE_PAGE_BYTES)


def _aligned(storage: Tensor, count: int, alignment_bytes: int) -> Tensor:
    offset = -storage.data_ptr() % alignment_bytes // storage.element_size()
    return storage[offset : offset + count]
