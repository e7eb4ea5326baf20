"""How one layer's keys and values lie in the paged cache.

A block holds 16 slots, so that one 512-bit vector holds the float32 scores of a block. bfloat16 is stored in the pairs
that a dot product consumes: keys pair dimensions, values pair slots.
Shapes: B blocks, G key/value heads, D head size (even).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SLOTS = 16
MAX_HEAD_DIM = 256


def key_cache_shape(num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """bfloat16 [B, G, D/2, 16, 2]; float32 [B, G, D, 16]."""
    if dtype == torch.bfloat16:
        return (num_blocks, num_kv_heads, head_dim // 2, BLOCK_SLOTS, 2)
    return (num_blocks, num_kv_heads, head_dim, BLOCK_SLOTS)


def value_cache_shape(num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """bfloat16 [B, G, 8, D, 2]; float32 [B, G, 16, D]."""
    if dtype == torch.bfloat16:
        return (num_blocks, num_kv_heads, BLOCK_SLOTS // 2, head_dim, 2)
    return (num_blocks, num_kv_heads, BLOCK_SLOTS, head_dim)


def keys_by_slot(key_cache: Tensor) -> Tensor:
    """A plain copy [B, 16, G, D]."""
    if key_cache.dtype == torch.bfloat16:
        return key_cache.permute(0, 3, 1, 2, 4).flatten(3)
    return key_cache.permute(0, 3, 1, 2).contiguous()


def values_by_slot(value_cache: Tensor) -> Tensor:
    """A plain copy [B, 16, G, D]."""
    if value_cache.dtype == torch.bfloat16:
        return value_cache.permute(0, 2, 4, 1, 3).flatten(1, 2)
    return value_cache.permute(0, 2, 1, 3).contiguous()
