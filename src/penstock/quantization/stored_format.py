"""What formats share: linears that are stored alike are packed into one matrix, others stand beside it.

A format says three things of a linear by its name, without reading a weight: how it will be packed, which linears may
share a matrix, and how rows get from the source into it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from penstock.base.errors import CheckpointError
from penstock.kernels.layouts import Layouts
from penstock.kernels.ops import Ops
from penstock.kernels.packed import PackedLinear
from penstock.kernels.quantized import QuantizedLinear, WeightLayout
from penstock.quantization.linear_format import EmbeddingWeight, LinearWeight
from penstock.quantization.packed_weight import Packed, PackedWeight, SplitWeight
from penstock.quantization.tensor_source import TensorSource

# Rows are packed in pieces of about this many elements and their source pages released after each, so that a mapped
# file and its packed copy are never resident together. Whole tiles of 16 rows. Where a kernel packs out of the mapping,
# without temporaries, pieces are large: each thread then first touches huge pages of its own: most of the work.
PIECE_ELEMENTS = 2 << 20
MAPPED_PIECE_ELEMENTS = 16 << 20
# Stored type of scales -> the kernels' name for it.
SCALE_NAMES = {"F16": "f16", "BF16": "bf16", "F32": "f32"}
_TILE_ROWS = 16


def row_pieces(num_rows: int, num_columns: int, num_elements: int = PIECE_ELEMENTS) -> Iterator[tuple[int, int]]:
    """[begin, end) of pieces of about num_elements, in whole tiles."""
    piece = max(num_elements // num_columns // _TILE_ROWS * _TILE_ROWS, _TILE_ROWS)
    for begin in range(0, num_rows, piece):
        yield begin, min(begin + piece, num_rows)


class StoredFormat(ABC):
    """dtype: of activations, and of weights that are not quantised (bfloat16 or float32).

    tensor_types: of every tensor of the checkpoint by name, where the format decides by them.
    """

    def __init__(self, dtype: torch.dtype, tensor_types: Mapping[str, str] | None = None) -> None:
        assert dtype in (torch.bfloat16, torch.float32), dtype
        self.dtype = dtype
        self.packing_s = 0.0  # spent in packing rows, the reading of their pages included
        self._types = tensor_types or {}

    @abstractmethod
    def layout(self, name: str, num_columns: int) -> WeightLayout | None:
        """How the linear `name` (without suffix) is packed; None: as floats of `dtype`."""

    @abstractmethod
    def pack_rows(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        """Packs all rows of a linear whose layout is not None."""

    def input_order(self, source: TensorSource, name: str, num_columns: int) -> Tensor | None:  # noqa: ARG002
        """The order in which a linear's columns are packed, int64 [K]; None: as they are."""
        return None

    def ignores(self, tensor: str) -> bool:  # noqa: ARG002
        """Whether a tensor of the checkpoint may stay unread."""
        return False

    def report_widened(self) -> None:
        """Logs which quantised types are held as floats."""
        return

    def load_linear(
        self, source: TensorSource, names: Sequence[str], num_rows: Sequence[int], num_columns: int, ops: Ops
    ) -> LinearWeight:
        orders = [self.input_order(source, name, num_columns) for name in names]
        layouts = [self.layout(name, num_columns) for name in names]
        parts: list[PackedWeight] = []
        for members in _runs(layouts, orders):
            packed = self._empty(
                sum(num_rows[index] for index in members), num_columns, layouts[members[0]], ops.layouts
            )
            first_row = 0
            for index in members:
                self._pack(source, names[index], (num_rows[index], num_columns), packed, first_row, ops)
                first_row += num_rows[index]
            order = orders[members[0]]
            parts.append(PackedWeight(packed, None if order is None else order.to(packed.data.device)))
        return parts[0] if len(parts) == 1 else SplitWeight(parts)

    def load_embedding(
        self, source: TensorSource, name: str, num_rows: int, num_columns: int, ops: Ops
    ) -> EmbeddingWeight:
        weight = self.load_linear(source, [name], [num_rows], num_columns, ops)
        assert isinstance(weight, PackedWeight)
        return weight

    def linear_nbytes(self, names: Sequence[str], num_rows: Sequence[int], num_columns: int, layouts: Layouts) -> int:
        """Linears of one layout count as one matrix, though columns in different orders would be more: by a tile."""
        chosen = [self.layout(name, num_columns) for name in names]
        total = 0
        for members in _runs(chosen, [None] * len(names)):
            layout, rows = chosen[members[0]], sum(num_rows[index] for index in members)
            if layout is None:
                total += layouts.linear_nbytes(rows, num_columns, self.dtype)
            else:
                total += layouts.quantized_nbytes(rows, num_columns, layout)
        return total

    def _empty(self, num_rows: int, num_columns: int, layout: WeightLayout | None, layouts: Layouts) -> Packed:
        if layout is None:
            return layouts.empty_linear(num_rows, num_columns, self.dtype)
        return layouts.empty_quantized(num_rows, num_columns, layout, self.dtype)

    def _pack(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: Packed, first_row: int, ops: Ops
    ) -> None:
        started = time.perf_counter()
        if isinstance(packed, PackedLinear):
            pack_floats(source, f"{name}.weight", shape, packed, first_row, ops)
        else:
            self.pack_rows(source, name, shape, packed, first_row, ops)
        self.packing_s += time.perf_counter() - started


def pack_floats(
    source: TensorSource, name: str, shape: tuple[int, int], packed: PackedLinear, first_row: int, ops: Ops
) -> None:
    """Packs all rows of the float tensor `name`."""
    for begin, end in row_pieces(*shape, MAPPED_PIECE_ELEMENTS):
        ops.pack_into(packed, first_row + begin, source.rows(name, shape, begin, end))
        source.release(name, begin, end)


def sorted_order(source: TensorSource, tensor: str, num_columns: int, group_size: int) -> Tensor | None:
    """The order of columns that puts the members of each group side by side; None: they are.

    tensor: of the group of each column, int32 [K]. group_size: 0 for one group of all.
    """
    groups = source.stored(tensor, (num_columns,)).long()
    in_order = torch.arange(num_columns) // (group_size or num_columns)
    if torch.equal(groups, in_order):
        return None
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], in_order):
        raise CheckpointError(f"{tensor} does not put {group_size} inputs into each group.")
    return order


def _runs(layouts: Sequence[WeightLayout | None], orders: Sequence[Tensor | None]) -> list[list[int]]:
    """Neighbours that can share a matrix, as lists of indices."""
    key = 0
    keys = [0]
    for index in range(1, len(layouts)):
        before, after = orders[index - 1], orders[index]
        same_order = before is after or (before is not None and after is not None and torch.equal(before, after))
        key += 0 if same_order and layouts[index] == layouts[index - 1] else 1
        keys.append(key)
    return [list(members) for _, members in groupby(range(len(keys)), key=keys.__getitem__)]
