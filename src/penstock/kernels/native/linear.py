"""Linear layers over packed weights, and the embedding gathered out of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from penstock.kernels.native.dtypes import DTYPE_CODE

if TYPE_CHECKING:
    from torch import Tensor

    from penstock._native import Kernels
    from penstock.kernels.packed import PackedLinear


def pack_into(kernels: Kernels, num_threads: int, packed: PackedLinear, first_row: int, source: Tensor) -> None:
    """See Ops.pack_into."""
    rows, k = source.shape
    assert source.is_contiguous(), source.stride()
    assert k == packed.k, (source.shape, packed.k)
    assert 0 <= first_row <= packed.n - rows, (first_row, rows, packed.n)
    kernels.pack(
        source.data_ptr(), packed.data.data_ptr(), first_row, rows, k,
        DTYPE_CODE[source.dtype], DTYPE_CODE[packed.dtype], num_threads,
    )  # fmt: skip


def linear(
    kernels: Kernels,
    num_threads: int,
    x_TK: Tensor,
    weight: PackedLinear,
    bias_N: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """See Ops.linear."""
    dtype = x_TK.dtype
    m, k = x_TK.shape
    n = weight.n
    assert x_TK.is_contiguous(), x_TK.stride()
    assert dtype is weight.dtype, (dtype, weight.dtype)
    assert k == weight.k, (k, weight.k)
    bias = 0
    if bias_N is not None:
        assert bias_N.dtype is dtype, bias_N.dtype
        assert bias_N.shape == (n,), (bias_N.shape, n)
        assert bias_N.is_contiguous(), bias_N.stride()
        bias = bias_N.data_ptr()
    if out_dtype is None or out_dtype is dtype:
        out = x_TK.new_empty((m, n))
    else:
        assert out_dtype is torch.float32, out_dtype
        out = torch.empty((m, n), dtype=out_dtype)
    kernels.linear(
        x_TK.data_ptr(), weight.data.data_ptr(), bias, out.data_ptr(), m, n, k,
        DTYPE_CODE[dtype], DTYPE_CODE[out.dtype], num_threads,
    )  # fmt: skip
    return out


def embedding(kernels: Kernels, num_threads: int, ids_T: Tensor, weight: PackedLinear) -> Tensor:
    """See Ops.embedding."""
    tokens = ids_T.shape[0]
    assert ids_T.dtype is torch.int64, ids_T.dtype
    assert ids_T.is_contiguous(), ids_T.stride()
    out = torch.empty((tokens, weight.k), dtype=weight.dtype)
    kernels.embedding(
        ids_T.data_ptr(), weight.data.data_ptr(), out.data_ptr(), tokens, weight.k,
        DTYPE_CODE[weight.dtype], num_threads,
    )  # fmt: skip
    return out
