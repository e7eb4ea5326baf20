"""Linear layers (possibly fused of several) and embeddings, whatever format their weights are in.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.quantization import EmbeddingWeight, LinearWeight


class Linear:
    """x @ weight.T + bias."""

    __slots__ = ("bias_N", "weight")

    def __init__(self, weight: LinearWeight, bias_N: Tensor | None = None) -> None:
        self.weight = weight
        self.bias_N = bias_N

    def __call__(self, x_TK: Tensor, ops: Ops, out_dtype: torch.dtype | None = None) -> Tensor:
        """[T, K] -> [T, N] of `out_dtype` (None: of x's)."""
        return self.weight.multiply(x_TK, self.bias_N, out_dtype, ops)


class Embedding:
    """Rows of a table by token id. `as_head` makes the output head that shares (ties) the same weight."""

    __slots__ = ("weight",)

    def __init__(self, weight: EmbeddingWeight) -> None:
        self.weight = weight

    def __call__(self, ids_T: Tensor, ops: Ops) -> Tensor:
        """[T] int64 -> [T, K]."""
        return self.weight.gather(ids_T, ops)

    def as_head(self) -> Linear:
        return Linear(self.weight)
