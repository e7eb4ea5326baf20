"""How an op table keeps what lives long, weights and the key/value cache: on which device, in which order of bytes.

Nothing outside `kernels` knows a layout: sizes are asked for here, memory is allocated here, and only the op table
reads and writes what is in it. Shapes: N outputs, K inputs of a weight; B blocks, G key/value heads, D head size.
"""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from penstock.kernels import huge_pages, kv_layout, packed, quantized

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.kernels.packed import PackedLinear
    from penstock.kernels.quantized import QuantizedLinear, WeightLayout


class Layouts(ABC):
    """Sizes in bytes before anything is allocated, and empty memory of exactly these sizes. device: where it lies.

    version: changes with the bytes of any packed weight, so that a compiled package is never read wrong.
    stacks_experts: a mixture's experts are rows of one weight, for ops.experts.mlp; else each is a weight of its own.
    """

    __slots__ = ("device",)
    version: ClassVar[str]
    stacks_experts: ClassVar[bool] = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def linear_nbytes(self, n: int, k: int, dtype: torch.dtype) -> int:
        """Of a float weight [n, k]."""

    @abstractmethod
    def empty_linear(self, n: int, k: int, dtype: torch.dtype) -> PackedLinear:
        """An unfilled float weight [n, k] of bfloat16 or float32."""

    @abstractmethod
    def quantized_nbytes(self, n: int, k: int, layout: WeightLayout) -> int:
        """Of a quantised weight [n, k]."""

    @abstractmethod
    def empty_quantized(self, n: int, k: int, layout: WeightLayout, dtype: torch.dtype) -> QuantizedLinear:
        """An unfilled quantised weight [n, k], to be multiplied with activations of `dtype`."""

    @property
    def has_fp8(self) -> bool:
        """Whether the kernels compute with 8-bit floats as they are kept."""
        return True

    @abstractmethod
    def cache_block_nbytes(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Of one block of one layer, keys and values together."""

    @abstractmethod
    def empty_caches(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, [B, ...] each, equally far apart in one piece of memory; zero."""


def split_arena(arena: Tensor, key_shape: tuple[int, ...], value_shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Views of memory [layers, 2, elements] as keys and values of each layer."""
    return [(keys.view(key_shape), values.view(value_shape)) for keys, values in arena]


class HostLayouts(Layouts):
    """Of the native and the reference kernels: in tiles of 16 outputs (packed.py, quantized.py) and pairs of bfloat16
    (kv_layout.py), in huge pages of the host's memory. The same for every instruction set."""

    __slots__ = ("_arena",)
    version = "host-2"

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._arena = huge_pages.Arena()

    def linear_nbytes(self, n: int, k: int, dtype: torch.dtype) -> int:
        return packed.packed_nbytes(n, k, dtype)

    def empty_linear(self, n: int, k: int, dtype: torch.dtype) -> PackedLinear:
        return packed.empty_packed(n, k, dtype, self._arena.empty)

    def quantized_nbytes(self, n: int, k: int, layout: WeightLayout) -> int:
        return quantized.quantized_nbytes(n, k, layout)

    def empty_quantized(self, n: int, k: int, layout: WeightLayout, dtype: torch.dtype) -> QuantizedLinear:
        return quantized.empty_quantized(n, k, layout, dtype, self._arena.empty)

    def cache_block_nbytes(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_kv_heads * kv_layout.head_block_elements(head_dim, dtype) * dtype.itemsize

    def empty_caches(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor]]:
        """In one anonymous mapping: pages are not resident until a block is first written, so a generous pool costs
        what is used of it."""
        key_shape = kv_layout.key_cache_shape(num_blocks, num_kv_heads, head_dim, dtype)
        value_shape = kv_layout.value_cache_shape(num_blocks, num_kv_heads, head_dim, dtype)
        count = num_blocks * num_kv_heads * kv_layout.head_block_elements(head_dim, dtype)
        memory = mmap.mmap(-1, 2 * num_layers * count * dtype.itemsize)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        arena = torch.frombuffer(memory, dtype=torch.uint8).view(dtype)
        return split_arena(arena.view(num_layers, 2, count), key_shape, value_shape)


class TorchLayouts(HostLayouts):
    """The same, of the reference kernels on another device than the host: plain memory of that device, zero."""

    __slots__ = ()

    def __init__(self, device: torch.device) -> None:
        Layouts.__init__(self, device)

    def empty_linear(self, n: int, k: int, dtype: torch.dtype) -> PackedLinear:
        count = packed.packed_nbytes(n, k, dtype) // dtype.itemsize
        return packed.PackedLinear(torch.zeros(count, dtype=dtype, device=self.device), n, k, dtype)

    def empty_quantized(self, n: int, k: int, layout: WeightLayout, dtype: torch.dtype) -> QuantizedLinear:
        data = torch.zeros(quantized.quantized_nbytes(n, k, layout), dtype=torch.uint8, device=self.device)
        return quantized.QuantizedLinear(data, n, k, layout, dtype)

    def empty_caches(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> list[tuple[Tensor, Tensor]]:
        key_shape = kv_layout.key_cache_shape(num_blocks, num_kv_heads, head_dim, dtype)
        value_shape = kv_layout.value_cache_shape(num_blocks, num_kv_heads, head_dim, dtype)
        arena = torch.zeros((num_layers, 2, math.prod(key_shape)), dtype=dtype, device=self.device)
        return split_arena(arena, key_shape, value_shape)
