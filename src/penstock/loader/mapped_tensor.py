"""What every mapped file of weights gives out: views of tensors, and which pages they lie on."""

from __future__ import annotations

import mmap

import msgspec


class TensorView(msgspec.Struct, frozen=True):
    """A tensor inside a mapping: the name of its type, its shape in elements, and its bytes (C order).

    dtype: of safetensors ("BF16", "I32", ...) or of GGUF, where a row may be stored in blocks ("Q4_K", ...).
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def page_span(begin: int, end: int, *, outward: bool) -> tuple[int, int]:
    """Start and length of the whole pages around (outward) or inside [begin, end)."""
    page = mmap.PAGESIZE
    if outward:
        first, last = begin // page * page, -(-end // page) * page
    else:
        first, last = -(-begin // page) * page, end // page * page
    return first, max(last - first, 0)
