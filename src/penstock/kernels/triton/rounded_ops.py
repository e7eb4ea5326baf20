"""Norms and activations that write what the next linear multiplies: its own rounding needs no kernel then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.kernels.triton.activation import silu_and_mul_quantize
from penstock.kernels.triton.linear import form_of, rounded_linear
from penstock.kernels.triton.norm import rms_norm_quantize

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from penstock.kernels.packed import PackedLinear
    from penstock.kernels.quantized import QuantizedLinear
    from penstock.kernels.rounded import RoundedActivations


class TritonRoundedOps:
    """See RoundedOps in kernels/ops.py."""

    form = staticmethod(form_of)
    rms_norm = staticmethod(rms_norm_quantize)
    silu_and_mul = staticmethod(silu_and_mul_quantize)

    def __init__(self, *, row_invariant: bool) -> None:
        self._row_invariant = row_invariant

    def linear(
        self,
        x: RoundedActivations,
        weight: PackedLinear | QuantizedLinear,
        bias_N: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return rounded_linear(x, weight, bias_N, out_dtype, row_invariant=self._row_invariant)
