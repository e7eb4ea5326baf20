"""The op table filled with the native kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.kernels.native import linear
from penstock.kernels.ops import Ops

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from penstock._native import Kernels
    from penstock.kernels.packed import PackedLinear


class NativeOps(Ops):
    """Every op is one call into `kernels`, the compiled kernels of one instruction set."""

    __slots__ = ("kernels",)

    def __init__(self, kernels: Kernels, num_threads: int) -> None:
        super().__init__("native", kernels.isa, num_threads)
        self.kernels = kernels

    def pack_into(self, packed: PackedLinear, first_row: int, source: Tensor) -> None:
        linear.pack_into(self.kernels, self.num_threads, packed, first_row, source)

    def linear(
        self, x_TK: Tensor, weight: PackedLinear, bias_N: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        return linear.linear(self.kernels, self.num_threads, x_TK, weight, bias_N, out_dtype)

    def embedding(self, ids_T: Tensor, weight: PackedLinear) -> Tensor:
        return linear.embedding(self.kernels, self.num_threads, ids_T, weight)
