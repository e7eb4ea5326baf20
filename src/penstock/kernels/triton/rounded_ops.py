"""Norms and activations that write what the next linear multiplies: its own rounding needs no kernel then."""

from __future__ import annotations

from functools import partial

from penstock.kernels.triton.activation import silu_and_mul_quantize
from penstock.kernels.triton.linear import form_of, rounded_linear
from penstock.kernels.triton.norm import rms_norm_quantize


class TritonRoundedOps:
    """See RoundedOps in kernels/ops.py."""

    form = staticmethod(form_of)
    rms_norm = staticmethod(rms_norm_quantize)
    silu_and_mul = staticmethod(silu_and_mul_quantize)

    def __init__(self, *, row_invariant: bool) -> None:
        self.linear = partial(rounded_linear, row_invariant=row_invariant)
