"""Weights and caches as the Triton kernels read them, in the GPU's memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.kernels.layouts import TorchLayouts, split_arena
from penstock.kernels.packed import PackedLinear
from penstock.kernels.quantized import QuantizedLinear, WeightLayout
from penstock.kernels.triton import configs, weights
from penstock.kernels.triton.kv_layout import cache_shape


class TritonLayouts(TorchLayouts):
    """Weights of weights.py; caches of kv_layout.py, a block of which takes as many bytes as the host's."""

    __slots__ = ()
    version = "triton-2"
    stacks_experts = True

    def linear_nbytes(self, n: int, k: int, dtype: torch.dtype) -> int:
        return weights.linear_nbytes(n, k, dtype)

    def empty_linear(self, n: int, k: int, dtype: torch.dtype) -> PackedLinear:
        return weights.empty_linear(n, k, dtype, self.device)

    def quantized_nbytes(self, n: int, k: int, layout: WeightLayout) -> int:
        return weights.quantized_nbytes(n, k, layout, configs.of_device(self.device).capability)

    def empty_quantized(self, n: int, k: int, layout: WeightLayout, dtype: torch.dtype) -> QuantizedLinear:
        capability = configs.of_device(self.device).capability
        return weights.empty_quantized(n, k, layout, dtype, self.device, capability)

    @property
    def has_fp8(self) -> bool:
        return configs.of_device(self.device).capability >= weights.MIN_FP8_CAPABILITY

    def empty_caches(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor]]:
        shape = cache_shape(num_blocks, num_kv_heads, head_dim, dtype)
        arena = torch.zeros((num_layers, 2, math.prod(shape)), dtype=dtype, device=self.device)
        return split_arena(arena, shape, shape)
