"""Weights as they are: bf16 or f32 kernels over bf16, f16 or f32 checkpoints.

A checkpoint in another dtype than the model's is converted while it is packed, tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.kernels.packed import PackedLinear, empty_packed, packed_nbytes
from penstock.quantization.tensor_source import TensorSource

# Rows are packed in pieces of about this many elements and their source pages released after each, so that a mapped
# file and its packed copy are never resident together. Whole tiles of 16 rows.
_PIECE_ELEMENTS = 2 << 20
_TILE_ROWS = 16


class PackedWeight:
    """A bf16 or f32 weight in the packed layout of ops.linear."""

    __slots__ = ("num_columns", "num_rows", "packed")

    def __init__(self, packed: PackedLinear) -> None:
        self.packed = packed
        self.num_rows = packed.n
        self.num_columns = packed.k

    def multiply(self, x_TK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype | None, ops: Ops) -> Tensor:
        return ops.linear(x_TK, self.packed, bias_N, out_dtype)

    def gather(self, ids_T: Tensor, ops: Ops) -> Tensor:
        return ops.embedding(ids_T, self.packed)


class UnquantizedFormat:
    """dtype: of the model (bfloat16 or float32), whatever the checkpoint holds."""

    def __init__(self, dtype: torch.dtype) -> None:
        assert dtype in (torch.bfloat16, torch.float32), dtype
        self.dtype = dtype

    def load_linear(
        self, source: TensorSource, names: Sequence[str], num_rows: Sequence[int], num_columns: int, ops: Ops
    ) -> PackedWeight:
        packed = empty_packed(sum(num_rows), num_columns, self.dtype)
        first_row = 0
        for name, rows in zip(names, num_rows, strict=True):
            self._pack(source, f"{name}.weight", (rows, num_columns), packed, first_row, ops)
            first_row += rows
        return PackedWeight(packed)

    def load_embedding(
        self, source: TensorSource, name: str, num_rows: int, num_columns: int, ops: Ops
    ) -> PackedWeight:
        return self.load_linear(source, [name], [num_rows], num_columns, ops)

    def linear_nbytes(self, num_rows: int, num_columns: int) -> int:
        return packed_nbytes(num_rows, num_columns, self.dtype)

    def _pack(
        self,
        source: TensorSource,
        name: str,
        shape: tuple[int, int],
        packed: PackedLinear,
        first_row: int,
        ops: Ops,
    ) -> None:
        rows, columns = shape
        piece = max(_PIECE_ELEMENTS // columns // _TILE_ROWS * _TILE_ROWS, _TILE_ROWS)
        for begin in range(0, rows, piece):
            end = min(begin + piece, rows)
            ops.pack_into(packed, first_row + begin, source.rows(name, shape, begin, end))
            source.release(name, begin, end)
