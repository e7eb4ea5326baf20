"""Rounding of a row to 8 bits, inside a kernel: as kernels/reference/attention.py rounds a head."""

from __future__ import annotations

import triton
import triton.language as tl


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
