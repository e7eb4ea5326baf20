"""The memory of the key/value cache: one anonymous mapping, cut into one key and one value tensor a layer.

Pages are zero and not resident until a block is first written, so a generous pool costs what is used of it.

Owns: the KV tensors.
Never: knows which block belongs to whom.
"""

from __future__ import annotations

import mmap
from typing import Final

import torch

from penstock.config.engine import EngineConfig
from penstock.config.model import ModelConfig
from penstock.kernels.kv_layout import BLOCK_SLOTS, head_block_elements, key_cache_shape, value_cache_shape
from penstock.layers import KVCache
from penstock.runner.loading import torch_dtype

_DTYPES: Final = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def cache_dtype(config: EngineConfig) -> torch.dtype:
    """What keys and values are kept as."""
    return torch_dtype(config.dtype) if config.cache.dtype == "model" else _DTYPES[config.cache.dtype]


def block_nbytes(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values; 0 for an encoder, which keeps none."""
    if model.is_encoder:
        return 0
    assert block_size == BLOCK_SLOTS, block_size
    head = head_block_elements(model.head_dim, dtype) * dtype.itemsize
    return 2 * model.num_layers * model.num_kv_heads * head


class KVPool:
    """caches: for each layer its keys and values, in the blocked layouts of kernels/kv_layout.py."""

    def __init__(self, model: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        self.num_blocks = num_blocks
        self.caches: list[KVCache] = []
        self.tensors: list[torch.Tensor] = []
        if num_blocks == 0:
            return
        heads, size = model.num_kv_heads, model.head_dim
        key_shape = key_cache_shape(num_blocks, heads, size, dtype)
        value_shape = value_cache_shape(num_blocks, heads, size, dtype)
        count = num_blocks * heads * head_block_elements(size, dtype)
        self._memory = mmap.mmap(-1, num_blocks * block_nbytes(model, block_size, dtype))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        arena = torch.frombuffer(self._memory, dtype=torch.uint8).view(dtype)
        pieces = arena.view(model.num_layers, 2, count).unbind(0)
        self.caches = [KVCache(piece[0].view(key_shape), piece[1].view(value_shape)) for piece in pieces]
        self.tensors = [tensor for cache in self.caches for tensor in cache]
