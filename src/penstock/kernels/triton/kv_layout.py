"""How one layer's keys and values lie in the paged cache of a GPU.

Keys and values lie alike: bfloat16 and float32 [B, G, S, D], so that a head's block is one contiguous piece (4 KB at
D = 128, bfloat16), read in rows of 16-byte loads. int8 and float8_e4m3fn: a head's block is S * D bytes of codes
[S, D], then the float32 scales of its S slots: value = scale * code. S is a power of two, at least 16. A block takes as
many bytes as in kernels/kv_layout.py.
Shapes: B blocks, G key/value heads, S slots of a block, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.kv_layout import BLOCK_SLOTS, QUANTIZED_DTYPES

_SCALE_NBYTES = 4


def cache_shape(
    num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, slots: int = BLOCK_SLOTS
) -> tuple[int, ...]:
    """Of the keys, and of the values: [B, G, S, D]; 8 bits [B, G, S * (D + 4)]."""
    if dtype in QUANTIZED_DTYPES:
        return (num_blocks, num_kv_heads, slots * (head_dim + _SCALE_NBYTES))
    return (num_blocks, num_kv_heads, slots, head_dim)


def num_slots(cache: Tensor, head_dim: int) -> int:
    """Slots of a block."""
    if cache.dtype in QUANTIZED_DTYPES:
        return cache.shape[2] // (head_dim + _SCALE_NBYTES)
    return cache.shape[2]


def codes_and_scales(cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Views of a cache in 8 bits: codes [B, G, S, D], scales float32 [B, G, S]."""
    slots = num_slots(cache, head_dim)
    codes = cache[..., : slots * head_dim].view(*cache.shape[:2], slots, head_dim)
    return codes, cache[..., slots * head_dim :].view(torch.float32)


def by_slot(cache: Tensor, head_dim: int) -> Tensor:
    """A plain view or copy [B, S, G, D]; of 8 bits, the float32 values."""
    if cache.dtype in QUANTIZED_DTYPES:
        codes, scales = codes_and_scales(cache, head_dim)
        return (codes.float() * scales[..., None]).transpose(1, 2)
    return cache.transpose(1, 2)


def scales_of(cache: Tensor) -> Tensor:
    """What a kernel addresses a cache's scales from: its memory as float32 (of other than 8 bits: the cache)."""
    return cache.view(torch.float32) if cache.dtype in QUANTIZED_DTYPES else cache
