"""Rotary embedding with the cache write, attention over the paged cache or whole texts, and block copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from penstock.kernels.kv_layout import MAX_HEAD_DIM, QUANTIZED_DTYPES, head_block_elements
from penstock.kernels.native.dtypes import DTYPE_CODE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from penstock._native import Kernels


def _check_caches(key_cache: Tensor, value_cache: Tensor, head_dim: int, dtype: torch.dtype) -> None:
    _check_dtypes(key_cache, value_cache, dtype)
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    num_blocks, num_kv_heads = key_cache.shape[:2]
    size = num_blocks * num_kv_heads * head_block_elements(head_dim, key_cache.dtype)
    assert key_cache.numel() == size == value_cache.numel(), (key_cache.shape, value_cache.shape, head_dim)
    assert head_dim <= MAX_HEAD_DIM and head_dim % 2 == 0, head_dim


def _check_dtypes(key_cache: Tensor, value_cache: Tensor, dtype: torch.dtype) -> None:
    assert key_cache.dtype is value_cache.dtype, (key_cache.dtype, value_cache.dtype)
    assert key_cache.dtype is dtype or key_cache.dtype in QUANTIZED_DTYPES, (key_cache.dtype, dtype)


def rope_and_cache(
    kernels: Kernels,
    num_threads: int,
    qkv_TS: Tensor,
    rotary: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    slot_mapping_T: Tensor,
    qk_norm: tuple[Tensor, Tensor, float] | None,
) -> None:
    """See Ops.rope_and_cache. rotary: (cosines, sines). caches: (keys, values)."""
    cos_TE, sin_TE = rotary
    key_cache, value_cache = caches
    tokens, half = cos_TE.shape
    head_dim, num_kv_heads, dtype = 2 * half, key_cache.shape[1], qkv_TS.dtype
    num_heads = qkv_TS.shape[1] // head_dim - 2 * num_kv_heads
    _check_caches(key_cache, value_cache, head_dim, dtype)
    assert qkv_TS.shape == (tokens, (num_heads + 2 * num_kv_heads) * head_dim) and qkv_TS.is_contiguous(), qkv_TS.shape
    assert cos_TE.dtype is torch.float32 and sin_TE.dtype is torch.float32 and sin_TE.shape == cos_TE.shape
    assert cos_TE.is_contiguous() and sin_TE.is_contiguous()
    assert slot_mapping_T.dtype is torch.int64 and slot_mapping_T.shape == (tokens,), slot_mapping_T.shape
    q_norm, k_norm, eps = 0, 0, 0.0
    if qk_norm is not None:
        q_weight, k_weight, eps = qk_norm
        assert q_weight.shape == k_weight.shape == (head_dim,) and q_weight.dtype is k_weight.dtype is dtype
        q_norm, k_norm = q_weight.data_ptr(), k_weight.data_ptr()
    kernels.rope_and_cache(
        qkv_TS.data_ptr(), cos_TE.data_ptr(), sin_TE.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(),
        slot_mapping_T.data_ptr(), q_norm, k_norm, tokens, num_heads, num_kv_heads, head_dim, eps,
        DTYPE_CODE[dtype], DTYPE_CODE[key_cache.dtype], num_threads,
    )  # fmt: skip


def paged_attention(
    kernels: Kernels,
    num_threads: int,
    q_THD: Tensor,
    caches: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    scale: float,
    sliding_window: int,
) -> Tensor:
    """See Ops.paged_attention. caches: (keys, values). tables: (block tables, context lengths, query starts)."""
    key_cache, value_cache = caches
    block_tables_RW, context_lens_R, query_starts = tables
    tokens, num_heads, head_dim = q_THD.shape
    requests, max_blocks = block_tables_RW.shape
    dtype, num_kv_heads = q_THD.dtype, key_cache.shape[1]
    # The caches' whole shape is checked where they are written, in rope_and_cache: microseconds count here.
    _check_dtypes(key_cache, value_cache, dtype)
    q_stride, head_stride, dim_stride = q_THD.stride()
    assert dim_stride == 1 and head_stride == head_dim and num_heads % num_kv_heads == 0, (q_THD.shape, q_THD.stride())
    assert block_tables_RW.dtype is context_lens_R.dtype is query_starts.dtype is torch.int32
    assert context_lens_R.numel() == requests == query_starts.numel() - 1, (context_lens_R.shape, query_starts.shape)
    assert block_tables_RW.is_contiguous() and scale > 0.0 and sliding_window >= 0
    out = torch.empty((tokens, num_heads * head_dim), dtype=dtype)
    kernels.paged_attention(
        q_THD.data_ptr(), q_stride, key_cache.data_ptr(), value_cache.data_ptr(), block_tables_RW.data_ptr(),
        max_blocks, context_lens_R.data_ptr(), query_starts.data_ptr(), out.data_ptr(), requests, num_heads,
        num_kv_heads, head_dim, scale, sliding_window, DTYPE_CODE[dtype], DTYPE_CODE[key_cache.dtype], num_threads,
    )  # fmt: skip
    return out


def full_attention(
    kernels: Kernels, num_threads: int, qkv_TS: Tensor, query_starts: Tensor, num_heads: int, scale: float
) -> Tensor:
    """See Ops.full_attention."""
    tokens, width = qkv_TS.shape
    assert qkv_TS.is_contiguous() and width % (3 * num_heads) == 0 and scale > 0.0, (qkv_TS.shape, num_heads)
    assert query_starts.dtype is torch.int32 and query_starts.is_contiguous(), query_starts.dtype
    out = torch.empty((tokens, width // 3), dtype=qkv_TS.dtype)
    kernels.full_attention(
        qkv_TS.data_ptr(), query_starts.data_ptr(), out.data_ptr(), query_starts.numel() - 1, num_heads,
        width // 3 // num_heads, scale, DTYPE_CODE[qkv_TS.dtype], num_threads,
    )  # fmt: skip
    return out


def copy_blocks(kernels: Kernels, caches: Sequence[Tensor], sources: Tensor, destinations: Tensor) -> None:
    """See Ops.copy_blocks."""
    assert sources.dtype is destinations.dtype is torch.int64 and sources.shape == destinations.shape
    for cache in caches:
        assert cache.is_contiguous()
        block_bytes = cache.nbytes // cache.shape[0]
        kernels.copy_blocks(
            cache.data_ptr(), block_bytes, sources.data_ptr(), destinations.data_ptr(), sources.shape[0]
        )
