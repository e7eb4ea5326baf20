"""RMSNorm and LayerNorm, alone and after a sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from penstock.kernels.native.dtypes import DTYPE_CODE

if TYPE_CHECKING:
    from torch import Tensor

    from penstock._native import Kernels


def rms_norm(
    kernels: Kernels, num_threads: int, x_TK: Tensor, residual_TK: Tensor | None, weight_K: Tensor, eps: float
) -> Tensor:
    """See Ops.rms_norm."""
    dtype = x_TK.dtype
    tokens, size = x_TK.shape
    assert x_TK.is_contiguous() and weight_K.dtype is dtype and weight_K.shape == (size,), (x_TK.shape, weight_K.shape)
    residual = 0
    if residual_TK is not None:
        assert residual_TK.shape == x_TK.shape and residual_TK.dtype is dtype and residual_TK.is_contiguous()
        residual = residual_TK.data_ptr()
    out = torch.empty_like(x_TK)
    kernels.rms_norm(
        x_TK.data_ptr(), residual, weight_K.data_ptr(), out.data_ptr(), tokens, size, eps, DTYPE_CODE[dtype],
        num_threads,
    )  # fmt: skip
    return out


def layer_norm(
    kernels: Kernels,
    num_threads: int,
    x_TK: Tensor,
    residual_TK: Tensor | None,
    affine: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """See Ops.layer_norm. affine: (weight, bias)."""
    dtype, (weight_K, bias_K) = x_TK.dtype, affine
    tokens, size = x_TK.shape
    assert x_TK.is_contiguous() and weight_K.dtype is bias_K.dtype is dtype, (weight_K.dtype, bias_K.dtype, dtype)
    assert weight_K.shape == bias_K.shape == (size,), (weight_K.shape, bias_K.shape, size)
    residual = 0
    if residual_TK is not None:
        assert residual_TK.shape == x_TK.shape and residual_TK.dtype is dtype and residual_TK.is_contiguous()
        residual = residual_TK.data_ptr()
    out = torch.empty_like(x_TK)
    kernels.layer_norm(
        x_TK.data_ptr(), residual, weight_K.data_ptr(), bias_K.data_ptr(), out.data_ptr(), tokens, size, eps,
        DTYPE_CODE[dtype], num_threads,
    )  # fmt: skip
    return out
