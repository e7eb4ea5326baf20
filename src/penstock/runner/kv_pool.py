"""The memory of the key/value cache: one key and one value tensor a layer, in the layouts of the op table.

Owns: the KV tensors.
Never: knows which block belongs to whom.
"""

from __future__ import annotations

from typing import Final

import torch

from penstock.base.errors import ConfigError
from penstock.config.engine import EngineConfig
from penstock.config.model import ModelConfig
from penstock.kernels.kv_layout import BLOCK_SLOTS
from penstock.kernels.layouts import Layouts
from penstock.layers import KVCache
from penstock.runner.loading import torch_dtype

_DTYPES: Final = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def cache_dtype(config: EngineConfig, layouts: Layouts) -> torch.dtype:
    """What keys and values are kept as. Raises ConfigError where the kernels do not compute with it."""
    dtype = torch_dtype(config.dtype) if config.cache.dtype == "model" else _DTYPES[config.cache.dtype]
    if dtype is torch.float8_e4m3fn and not layouts.has_fp8:
        raise ConfigError(
            "This GPU has no 8-bit floats (NVIDIA's have, from compute capability 8.9 on).",
            remedy="Use --kv-cache-dtype int8, which takes as little memory.",
            param="kv_cache_dtype",
        )
    return dtype


def block_nbytes(model: ModelConfig, block_size: int, dtype: torch.dtype, layouts: Layouts) -> int:
    """Bytes of one block over all layers, keys and values; 0 for an encoder, which keeps none."""
    if model.is_encoder:
        return 0
    assert block_size == BLOCK_SLOTS, block_size
    return model.num_layers * layouts.cache_block_nbytes(model.num_kv_heads, model.head_dim, dtype)


class KVPool:
    """caches: for each layer its keys and values; tensors: the same, flat. Both empty without blocks."""

    def __init__(self, model: ModelConfig, num_blocks: int, dtype: torch.dtype, layouts: Layouts) -> None:
        self.num_blocks = num_blocks
        self.caches: list[KVCache] = []
        if num_blocks:
            shape = (model.num_layers, num_blocks, model.num_kv_heads, model.head_dim)
            self.caches = [KVCache(*pair) for pair in layouts.empty_caches(*shape, dtype)]
        self.tensors = [tensor for cache in self.caches for tensor in cache]

    def by_block(self) -> torch.Tensor:
        """The same memory as int64 [B, tensors, words]: all that belongs to a block, in one row."""
        first = self.tensors[0].view(-1).view(torch.int64)
        nbytes = self.tensors[1].data_ptr() - self.tensors[0].data_ptr()  # an arena: all lie equally far apart
        assert all(
            tensor.data_ptr() == self.tensors[0].data_ptr() + index * nbytes
            for index, tensor in enumerate(self.tensors)
        )
        words = first.shape[0] // self.num_blocks
        shape, strides = (self.num_blocks, len(self.tensors), words), (words, nbytes // 8, 1)
        return first.as_strided(shape, strides, first.storage_offset())
