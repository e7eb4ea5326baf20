"""Rounding to 8 bits, inside a kernel: as kernels/reference/attention.py rounds a head. What activations become."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from penstock.kernels.quantized import SUPER_GROUP
from penstock.kernels.rounded import ActivationForm, RoundedActivations
from penstock.kernels.triton.weights import DENSE_STEP

# All that there are: of e4m3 weights; of int8 weights whose layout has blocks of activations (INT8_CHANNEL), or not
# (W8A8).
FP8_BLOCKS: Final = ActivationForm(torch.float8_e4m3fn, DENSE_STEP)
INT8_BLOCKS: Final = ActivationForm(torch.int8, SUPER_GROUP)
INT8_ROWS: Final = ActivationForm(torch.int8, 0)


@triton.jit
def to_codes(x, largest, dtype: tl.constexpr, axis: tl.constexpr):
    """Codes of float32 x in int8 or float8e4nv, and the scale of each row along `axis`: x ~ codes * scale.

    The largest magnitude becomes `largest`. Where x is not finite, codes are 0 and the scale is NaN.
    """
    magnitude = tl.where(x == x, tl.abs(x), float("inf"))  # a maximum forgets a NaN
    most = tl.max(magnitude, axis, keep_dims=True)
    finite = most < float("inf")
    counts = finite & (most >= 1e-30)
    factor = tl.where(counts, tl.div_rn(largest, tl.where(counts, most, 1.0)), 0.0)
    scaled = tl.where(finite, x * factor, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -largest), largest)
    if dtype == tl.int8:
        # Adding and taking away 1.5 * 2^23 rounds to the nearest integer, of two to the even one.
        codes = ((scaled + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        codes = scaled.to(dtype)
    scale = tl.where(counts, tl.div_rn(most, largest), 0.0)
    return codes, tl.sum(tl.where(finite, scale, float("nan")), axis)


def empty_rounded(tokens: int, size: int, form: ActivationForm, device: torch.device) -> RoundedActivations:
    """Unfilled, for rows of `size` inputs: codes [tokens, whole steps of the matrix kernels], a scale a block."""
    k_padded = triton.cdiv(size, DENSE_STEP) * DENSE_STEP
    num_blocks = triton.cdiv(k_padded, form.block or k_padded)
    return RoundedActivations(
        torch.empty((tokens, k_padded), dtype=form.dtype, device=device),
        torch.empty((tokens, num_blocks), dtype=torch.float32, device=device),
    )
