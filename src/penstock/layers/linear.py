"""Linear layers (possibly fused of several) and embeddings, whatever format their weights are in.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.kernels.rounded import ActivationForm, Activations, RoundedActivations
from penstock.quantization import EmbeddingWeight, LinearWeight, PackedWeight
from penstock.quantization.packed_weight import Packed


class Linear:
    """x @ weight.T + bias."""

    __slots__ = ("bias_N", "weight")

    def __init__(self, weight: LinearWeight, bias_N: Tensor | None = None) -> None:
        self.weight = weight
        self.bias_N = bias_N

    def __call__(self, x_TK: Activations, ops: Ops, out_dtype: torch.dtype | None = None) -> Tensor:
        """[T, K] -> [T, N] of `out_dtype` (None: of x's). x: may be in the weight's `form`."""
        if isinstance(x_TK, RoundedActivations):
            assert ops.rounded is not None
            assert isinstance(self.weight, PackedWeight)
            return ops.rounded.linear(x_TK, self.weight.packed, self.bias_N, out_dtype)
        return self.weight.multiply(x_TK, self.bias_N, out_dtype, ops)

    def gated(self, x_TK: Activations, ops: Ops) -> Tensor:
        """silu_and_mul of what a call gives -> [T, N / 2]."""
        packed = self._packed()
        if packed is None or isinstance(x_TK, RoundedActivations):
            return ops.silu_and_mul(self(x_TK, ops))
        return ops.gated_linear(x_TK, packed, self.bias_N)

    def form(self, ops: Ops) -> ActivationForm | None:
        """What the op before can round x to, where this linear would round it anyway; None: x stays as it is."""
        packed = self._packed()
        return None if ops.rounded is None or packed is None else ops.rounded.form(packed)

    def _packed(self) -> Packed | None:
        """The weight, if it is one matrix whose inputs are in the order of x."""
        weight = self.weight
        return weight.packed if isinstance(weight, PackedWeight) and weight.input_order is None else None


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
