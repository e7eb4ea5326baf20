"""Linear weights in the layout the kernels read (csrc/ops/linear.h describes it)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels import huge_pages

TILE_COLUMNS = 16
Empty = Callable[[int, torch.dtype], Tensor]  # so many uninitialised elements of a type


def k_group(dtype: torch.dtype) -> int:
    """How many inputs stand side by side in the packed layout: bf16 is multiplied in pairs."""
    return 2 if dtype == torch.bfloat16 else 1


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight [n, k], packed: `data` is flat, of n_padded * k_padded elements of `dtype` (float32 or bfloat16)."""

    data: Tensor
    n: int
    k: int
    dtype: torch.dtype

    @property
    def held_as(self) -> str:
        """In which type weights are held, and what of their inputs if they are multiplied in another."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def n_padded(self) -> int:
        return _round_up(self.n, TILE_COLUMNS)

    @property
    def k_padded(self) -> int:
        return _round_up(self.k, k_group(self.dtype))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def tiles(self) -> Tensor:
        """A view [n_padded / 16, k_padded / group, 16, group]."""
        group = k_group(self.dtype)
        return self.data.view(self.n_padded // TILE_COLUMNS, self.k_padded // group, TILE_COLUMNS, group)


def packed_nbytes(n: int, k: int, dtype: torch.dtype) -> int:
    """Bytes that a packed [n, k] takes."""
    return _round_up(n, TILE_COLUMNS) * _round_up(k, k_group(dtype)) * dtype.itemsize


def empty_packed(n: int, k: int, dtype: torch.dtype, empty: Empty = huge_pages.empty) -> PackedLinear:
    """An unfilled packed weight, its padding rows zero. empty: gives memory."""
    assert n > 0, n
    assert k > 0, k
    assert dtype in (torch.float32, torch.bfloat16), dtype
    packed = PackedLinear(empty(packed_nbytes(n, k, dtype) // dtype.itemsize, dtype), n, k, dtype)
    if n % TILE_COLUMNS:
        packed.tiles()[-1, :, n % TILE_COLUMNS :].zero_()
    return packed
