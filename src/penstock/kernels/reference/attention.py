"""Rotary embedding with the cache write, attention over the paged cache, and block copies, in torch."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from penstock.kernels.kv_layout import BLOCK_SLOTS, QUANTIZED_DTYPES, codes_and_scales, keys_by_slot, values_by_slot
from penstock.kernels.reference.norm import rms_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def _rotate(x_TND: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    first, second = x_TND.float().chunk(2, dim=-1)
    cos, sin = cos_TE[:, None], sin_TE[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_TND.dtype)


def _round(x_TGD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales [T, G]; where x is not finite, codes are 0 and the scale is NaN."""
    largest = QUANTIZED_DTYPES[dtype]
    x = x_TGD.float()
    most = x.abs().amax(2, keepdim=True)
    scaled = torch.where(
        most.isfinite(), x * torch.where(most >= 1e-30, torch.full_like(most, largest) / most, 0.0), 0.0
    )
    codes = scaled.round().to(dtype) if dtype == torch.int8 else scaled.clamp(-largest, largest).to(dtype)
    scales = torch.where(most >= 1e-30, most / largest, 0.0)
    return codes, torch.where(most.isfinite(), scales, torch.nan)[..., 0]


def rope_and_cache(
    qkv_TS: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping_T: Tensor,
    qk_norm: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """See Ops.rope_and_cache."""
    dim, num_kv_heads = 2 * cos_TE.shape[1], key_cache.shape[1]
    heads = qkv_TS.view(qkv_TS.shape[0], -1, dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if qk_norm is not None:
        q_weight, k_weight, eps = qk_norm
        q, k = rms_norm(q, None, q_weight, eps), rms_norm(k, None, k_weight, eps)
    heads[:, :num_heads] = _rotate(q, cos_TE, sin_TE)
    k = _rotate(k, cos_TE, sin_TE)
    written = slot_mapping_T >= 0
    block, offset = slot_mapping_T[written] // BLOCK_SLOTS, slot_mapping_T[written] % BLOCK_SLOTS
    if key_cache.dtype in QUANTIZED_DTYPES:
        key_codes, key_scales = codes_and_scales(key_cache, is_keys=True)
        value_codes, value_scales = codes_and_scales(value_cache, is_keys=False)
        codes, key_scales[block, :, offset] = _round(k[written], key_cache.dtype)
        key_codes[block, :, :, offset] = codes.view(-1, num_kv_heads, dim // 2, 2)
        codes, value_scales[block, :, offset] = _round(v[written], key_cache.dtype)
        value_codes[block, :, offset // 2, :, offset % 2] = codes
    elif qkv_TS.dtype == torch.bfloat16:
        key_cache[block, :, :, offset] = k[written].view(-1, num_kv_heads, dim // 2, 2)
        value_cache[block, :, offset // 2, :, offset % 2] = v[written]
    else:
        key_cache[block, :, :, offset] = k[written]
        value_cache[block, :, offset] = v[written]


def paged_attention(
    q_THD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables_RW: Tensor,
    context_lens_R: Tensor,
    query_starts: Tensor,
    scale: float,
    sliding_window: int = 0,
) -> Tensor:
    """See Ops.paged_attention."""
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    group = q_THD.shape[1] // key_cache.shape[1]
    starts = query_starts.tolist()
    for request, context_len in enumerate(context_lens_R.tolist()):
        rows = slice(starts[request], starts[request + 1])
        blocks = block_tables_RW[request, : -(-context_len // BLOCK_SLOTS)].long()
        keys = keys_by_slot(key_cache[blocks]).flatten(0, 1)[:context_len].float().repeat_interleave(group, dim=1)
        values = values_by_slot(value_cache[blocks]).flatten(0, 1)[:context_len].float()
        q = q_THD[rows].float()
        positions = torch.arange(context_len, device=q.device)
        behind = positions[context_len - q.shape[0] :, None] - positions
        seen = behind >= 0
        if sliding_window:
            seen &= behind < sliding_window
        scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out_THD[rows] = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, dim=1)).to(q_THD.dtype)
    return out_THD.flatten(1)


def full_attention(qkv_TS: Tensor, query_starts: Tensor, num_heads: int, scale: float) -> Tensor:
    """See Ops.full_attention."""
    heads = qkv_TS.view(qkv_TS.shape[0], 3, num_heads, -1).float()
    texts = []
    for begin, end in itertools.pairwise(query_starts.tolist()):
        q, k, v = heads[begin:end].unbind(1)
        weights = (torch.einsum("qhd,khd->hqk", q, k) * scale).softmax(-1)
        texts.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(texts).flatten(1).to(qkv_TS.dtype)


def copy_blocks(caches: Sequence[Tensor], sources: Tensor, destinations: Tensor) -> None:
    """See Ops.copy_blocks."""
    for cache in caches:
        cache[destinations] = cache[sources]
