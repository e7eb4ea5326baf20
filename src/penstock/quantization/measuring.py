# ruff: noqa: ARG002  the signatures are those of the protocols
"""Building a model without weights, to count what they will take. The same constructors run as when it is loaded.

Owns: the count.
Never: allocates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels.layouts import Layouts
from penstock.kernels.ops import Ops
from penstock.quantization.linear_format import LinearFormat
from penstock.quantization.tensor_source import TensorSource


class AbsentWeight:
    """A weight that was counted. It cannot be used."""

    def __init__(self, num_rows: int, num_columns: int) -> None:
        self.num_rows = num_rows
        self.num_columns = num_columns

    def multiply(self, x_TK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype | None, ops: Ops) -> Tensor:
        raise AssertionError("a measured model has no weights")

    def gather(self, ids_T: Tensor, ops: Ops) -> Tensor:
        raise AssertionError("a measured model has no weights")


class MeasuringFormat:
    """Stands in for `linear_format` and for the source of small tensors; `nbytes` is the sum so far."""

    def __init__(self, linear_format: LinearFormat) -> None:
        self._format = linear_format
        self.nbytes = 0

    def load_linear(
        self, source: TensorSource, names: Sequence[str], num_rows: Sequence[int], num_columns: int, ops: Ops
    ) -> AbsentWeight:
        self.nbytes += self._format.linear_nbytes(names, num_rows, num_columns, ops.layouts)
        return AbsentWeight(sum(num_rows), num_columns)

    def load_embedding(
        self, source: TensorSource, name: str, num_rows: int, num_columns: int, ops: Ops
    ) -> AbsentWeight:
        return self.load_linear(source, [name], [num_rows], num_columns, ops)

    def linear_nbytes(self, names: Sequence[str], num_rows: Sequence[int], num_columns: int, layouts: Layouts) -> int:
        return self._format.linear_nbytes(names, num_rows, num_columns, layouts)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.nbytes += math.prod(shape) * dtype.itemsize
        return torch.empty(0, dtype=dtype)

    def shape(self, name: str) -> tuple[int, ...] | None:
        raise AssertionError("a measured model has no weights")

    def stored(self, name: str, shape: tuple[int, ...], begin: int = 0, end: int | None = None) -> Tensor:
        raise AssertionError("a measured model has no weights")

    def rows(self, name: str, shape: tuple[int, int], begin: int, end: int) -> Tensor:
        raise AssertionError("a measured model has no weights")

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        raise AssertionError("a measured model has no weights")

    def finish(self) -> None:
        return
