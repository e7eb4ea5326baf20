"""The activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from penstock.kernels.native.dtypes import DTYPE_CODE

if TYPE_CHECKING:
    from torch import Tensor

    from penstock._native import Kernels


def silu_and_mul(kernels: Kernels, num_threads: int, gate_up_TJ: Tensor) -> Tensor:
    """See Ops.silu_and_mul."""
    tokens, width = gate_up_TJ.shape
    assert gate_up_TJ.is_contiguous() and width % 2 == 0, (gate_up_TJ.shape, gate_up_TJ.stride())
    out = torch.empty((tokens, width // 2), dtype=gate_up_TJ.dtype)
    kernels.silu_and_mul(
        gate_up_TJ.data_ptr(), out.data_ptr(), tokens, width // 2, DTYPE_CODE[gate_up_TJ.dtype], num_threads
    )
    return out


def gelu(kernels: Kernels, num_threads: int, x_TI: Tensor) -> Tensor:
    """See Ops.gelu."""
    assert x_TI.is_contiguous(), x_TI.stride()
    out = torch.empty_like(x_TI)
    kernels.gelu(x_TI.data_ptr(), out.data_ptr(), x_TI.numel(), DTYPE_CODE[x_TI.dtype], num_threads)
    return out
