"""How one layer's keys and values lie in the paged cache.

A block holds 16 slots, so that one 512-bit vector holds the float32 scores of a block. bfloat16 is stored in the pairs
that a dot product consumes: keys pair dimensions, values pair slots. int8 and float8_e4m3fn are codes in bfloat16's
order, the block's bytes of one head followed by the float32 scales of its 16 slots: value = scale * code.
Shapes: B blocks, G key/value heads, D head size (even).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SLOTS = 16
MAX_HEAD_DIM = 256
# The largest magnitude of a code: a head's largest value becomes it.
QUANTIZED_DTYPES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SCALES_NBYTES = 4 * BLOCK_SLOTS


def head_block_elements(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that one head of a block takes, as many for keys as for values."""
    return BLOCK_SLOTS * head_dim + (_SCALES_NBYTES if dtype in QUANTIZED_DTYPES else 0)


def key_cache_shape(num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """bfloat16 [B, G, D/2, 16, 2]; float32 [B, G, D, 16]; 8 bits [B, G, 16 D + 64]."""
    if dtype in QUANTIZED_DTYPES:
        return (num_blocks, num_kv_heads, head_block_elements(head_dim, dtype))
    if dtype == torch.bfloat16:
        return (num_blocks, num_kv_heads, head_dim // 2, BLOCK_SLOTS, 2)
    return (num_blocks, num_kv_heads, head_dim, BLOCK_SLOTS)


def value_cache_shape(num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """bfloat16 [B, G, 8, D, 2]; float32 [B, G, 16, D]; 8 bits [B, G, 16 D + 64]."""
    if dtype in QUANTIZED_DTYPES:
        return (num_blocks, num_kv_heads, head_block_elements(head_dim, dtype))
    if dtype == torch.bfloat16:
        return (num_blocks, num_kv_heads, BLOCK_SLOTS // 2, head_dim, 2)
    return (num_blocks, num_kv_heads, BLOCK_SLOTS, head_dim)


def codes_and_scales(cache: Tensor, *, is_keys: bool) -> tuple[Tensor, Tensor]:
    """Views of a cache in 8 bits: codes as bfloat16's elements lie, scales float32 [B, G, 16]."""
    scales = cache[..., -_SCALES_NBYTES:].view(torch.float32)
    head_dim = (cache.shape[2] - _SCALES_NBYTES) // BLOCK_SLOTS
    shape = (head_dim // 2, BLOCK_SLOTS, 2) if is_keys else (BLOCK_SLOTS // 2, head_dim, 2)
    return cache[..., :-_SCALES_NBYTES].view(*cache.shape[:2], *shape), scales


def keys_by_slot(key_cache: Tensor) -> Tensor:
    """A plain copy [B, 16, G, D]; of 8 bits, the float32 values."""
    if key_cache.dtype in QUANTIZED_DTYPES:
        codes, scales = codes_and_scales(key_cache, is_keys=True)
        return codes.float().permute(0, 3, 1, 2, 4).flatten(3) * scales.transpose(1, 2)[..., None]
    if key_cache.dtype == torch.bfloat16:
        return key_cache.permute(0, 3, 1, 2, 4).flatten(3)
    return key_cache.permute(0, 3, 1, 2).contiguous()


def values_by_slot(value_cache: Tensor) -> Tensor:
    """A plain copy [B, 16, G, D]; of 8 bits, the float32 values."""
    if value_cache.dtype in QUANTIZED_DTYPES:
        codes, scales = codes_and_scales(value_cache, is_keys=False)
        return codes.float().permute(0, 2, 4, 1, 3).flatten(1, 2) * scales.transpose(1, 2)[..., None]
    if value_cache.dtype == torch.bfloat16:
        return value_cache.permute(0, 2, 4, 1, 3).flatten(1, 2)
    return value_cache.permute(0, 2, 1, 3).contiguous()
