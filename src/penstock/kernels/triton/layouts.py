"""Weights and caches as the Triton kernels read them, in the GPU's memory."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from penstock.kernels.layouts import TorchLayouts
from penstock.kernels.triton.kv_layout import cache_shape


class TritonLayouts(TorchLayouts):
    """Caches of kv_layout.py. A block takes as many bytes as the host's."""

    __slots__ = ()
    version = "triton-1"

    def empty_caches(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor]]:
        shape = cache_shape(num_blocks, num_kv_heads, head_dim, dtype)
        zeros = partial(torch.zeros, shape, dtype=dtype, device=self.device)
        return [(zeros(), zeros()) for _ in range(num_layers)]
