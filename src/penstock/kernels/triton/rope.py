"""Rotary embedding with the cache write, and block copies.

Limit: memory. rope_and_cache reads a token's q, k and v once, writes q in place and k, v into the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from penstock.kernels.kv_layout import QUANTIZED_DTYPES
from penstock.kernels.triton.kv_layout import cache_shape, num_slots, scales_of
from penstock.kernels.triton.rounding import to_codes
from penstock.kernels.triton.specialization import TYPE_NAMES, Specialization, specialization

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_HEADS = 8  # heads that one program takes
_WARPS = 4
_COPY_BLOCK = 1024
_ROPE_POINTERS = ("qkv_ptr", "cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr")


@triton.jit
def _normed(first, second, inverse, norm_ptr, dims, inside, HALF: tl.constexpr, dtype: tl.constexpr):
    """Both halves of heads times `inverse` and a weight, rounded as rms_norm rounds."""
    first_weight = tl.load(norm_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    second_weight = tl.load(norm_ptr + HALF + dims, mask=inside, other=0.0).to(tl.float32)
    first = first * inverse * first_weight[None, :]
    second = second * inverse * second_weight[None, :]
    return first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)


@triton.jit
def _store_heads(
    first, second, cache_ptr, scales_ptr, heads, num_kv_heads, slot, at, mask, largest, HALF: tl.constexpr,
    SLOTS: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Writes heads [HEADS, 2 HALF], given in halves, to one slot of a cache."""
    dtype = cache_ptr.dtype.element_ty
    block, offset = slot // SLOTS, slot % SLOTS
    head_block = block * num_kv_heads + heads
    if QUANTIZED:
        start = head_block * SLOTS * (2 * HALF + 4)
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * first.shape[1]))
        codes, scales = to_codes(both, largest, dtype, 1)
        first_codes, second_codes = tl.split(tl.reshape(codes, (first.shape[0], first.shape[1], 2)))
        row = cache_ptr + start[:, None] + offset * 2 * HALF + at
        tl.store(row, first_codes, mask=mask)
        tl.store(row + HALF, second_codes, mask=mask)
        inside = heads < num_kv_heads
        tl.store(scales_ptr + start // 4 + SLOTS * 2 * HALF // 4 + offset, scales, mask=inside)
    else:
        row = cache_ptr + (head_block * SLOTS + offset)[:, None] * (2 * HALF) + at
        tl.store(row, first.to(dtype), mask=mask)
        tl.store(row + HALF, second.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads"])
def _rope_and_cache_kernel(
    qkv_ptr, cos_ptr, sin_ptr, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, slots_ptr, q_norm_ptr, k_norm_ptr,
    num_heads, num_kv_heads, eps, largest, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, SLOTS: tl.constexpr,
    HEADS: tl.constexpr, NORMED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Bytes a token: (H + 2 G) D elements read and written (8-bit caches: half for 2 G of them); 4 D of cos and sin.

    A program takes HEADS heads of one token, all query heads, or all keys, or all values.
    """
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype = qkv_ptr.dtype.element_ty
    q_parts = tl.cdiv(num_heads, HEADS)
    kv_parts = tl.cdiv(num_kv_heads, HEADS)
    is_query = part < q_parts
    is_value = part >= q_parts + kv_parts
    part -= tl.where(is_query, 0, tl.where(is_value, q_parts + kv_parts, q_parts))
    before = tl.where(is_query, 0, tl.where(is_value, num_heads + num_kv_heads, num_heads))
    count = tl.where(is_query, num_heads, num_kv_heads)

    heads = part * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, HALF_PADDED)
    inside = dims < HALF
    mask = (heads < count)[:, None] & inside[None, :]
    width = (num_heads + 2 * num_kv_heads) * 2 * HALF
    row = qkv_ptr + token * width + (before + heads)[:, None] * (2 * HALF) + dims[None, :]
    first = tl.load(row, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(row + HALF, mask=mask, other=0.0).to(tl.float32)
    slot = tl.load(slots_ptr + token)
    if is_value:
        if slot >= 0:
            _store_heads(
                first, second, value_ptr, value_scales_ptr, heads, num_kv_heads, slot, dims[None, :], mask, largest,
                HALF, SLOTS, QUANTIZED,
            )  # fmt: skip
    else:
        if NORMED:
            squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
            inverse = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
            if is_query:
                first, second = _normed(first, second, inverse, q_norm_ptr, dims, inside, HALF, dtype)
            else:
                first, second = _normed(first, second, inverse, k_norm_ptr, dims, inside, HALF, dtype)
        cos = tl.load(cos_ptr + token * HALF + dims, mask=inside, other=0.0)[None, :]
        sin = tl.load(sin_ptr + token * HALF + dims, mask=inside, other=0.0)[None, :]
        turned_first = (first * cos - second * sin).to(dtype)
        turned_second = (second * cos + first * sin).to(dtype)
        if is_query:
            tl.store(row, turned_first, mask=mask)
            tl.store(row + HALF, turned_second, mask=mask)
        elif slot >= 0:
            _store_heads(
                turned_first.to(tl.float32), turned_second.to(tl.float32), key_ptr, key_scales_ptr, heads,
                num_kv_heads, slot, dims[None, :], mask, largest, HALF, SLOTS, QUANTIZED,
            )  # fmt: skip


@triton.jit
def _copy_blocks_kernel(cache_ptr, sources_ptr, destinations_ptr, size, BLOCK: tl.constexpr):
    """Bytes: each block read and written once. size: 8-byte words of a block."""
    pair = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources_ptr + pair)
    destination = tl.load(destinations_ptr + pair)
    words = tl.load(cache_ptr + source * size + at, mask=at < size)
    tl.store(cache_ptr + destination * size + at, words, mask=at < size)


def rope_and_cache(
    qkv_TS: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping_T: Tensor,
    qk_norm: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """See Ops.rope_and_cache. The caches lie as kernels/triton/kv_layout.py says; slot_mapping: block * S + offset."""
    tokens, half = cos_TE.shape
    num_kv_heads, dtype = key_cache.shape[1], qkv_TS.dtype
    num_heads = qkv_TS.shape[1] // (2 * half) - 2 * num_kv_heads
    slots = num_slots(key_cache, 2 * half)
    shape = cache_shape(key_cache.shape[0], num_kv_heads, 2 * half, key_cache.dtype, slots)
    assert key_cache.shape == shape == value_cache.shape and key_cache.dtype is value_cache.dtype, (shape, half)
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    quantized = key_cache.dtype in QUANTIZED_DTYPES
    assert quantized or key_cache.dtype is dtype, (key_cache.dtype, dtype)
    assert qkv_TS.shape == (tokens, (num_heads + 2 * num_kv_heads) * 2 * half) and qkv_TS.is_contiguous(), qkv_TS.shape
    assert cos_TE.dtype is sin_TE.dtype is torch.float32 and sin_TE.shape == cos_TE.shape
    assert cos_TE.is_contiguous() and sin_TE.is_contiguous()
    assert slot_mapping_T.dtype is torch.int64 and slot_mapping_T.shape == (tokens,), slot_mapping_T.shape
    q_norm, k_norm, eps = (qkv_TS, qkv_TS, 0.0) if qk_norm is None else qk_norm
    if tokens == 0:
        return
    _rope_and_cache_kernel[(tokens, triton.cdiv(num_heads, _HEADS) + 2 * triton.cdiv(num_kv_heads, _HEADS))](
        qkv_TS, cos_TE, sin_TE, key_cache, value_cache, scales_of(key_cache), scales_of(value_cache), slot_mapping_T,
        q_norm, k_norm, num_heads, num_kv_heads, eps, QUANTIZED_DTYPES.get(key_cache.dtype, 0.0), HALF=half,
        HALF_PADDED=triton.next_power_of_2(half), SLOTS=slots, HEADS=_HEADS, NORMED=qk_norm is not None,
        QUANTIZED=quantized, num_warps=_WARPS,
    )  # fmt: skip


def copy_blocks(caches: Sequence[Tensor], sources: Tensor, destinations: Tensor) -> None:
    """See Ops.copy_blocks. A block's bytes are a multiple of 8."""
    assert sources.dtype is destinations.dtype is torch.int64 and sources.shape == destinations.shape
    if sources.shape[0] == 0:
        return
    for cache in caches:
        assert cache.is_contiguous()
        words = cache.view(torch.uint8).view(cache.shape[0], -1).view(torch.int64)
        grid = (sources.shape[0], triton.cdiv(words.shape[1], _COPY_BLOCK))
        _copy_blocks_kernel[grid](words, sources, destinations, words.shape[1], BLOCK=_COPY_BLOCK, num_warps=_WARPS)


def specializations() -> Iterator[Specialization]:
    """Heads of 64, 96 and 128, with and without a norm, caches of 16 and 8 bits; block copies."""
    for head_dim, normed in ((64, False), (96, False), (128, False), (128, True)):
        for cache in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
            quantized = cache in QUANTIZED_DTYPES
            types = dict.fromkeys(_ROPE_POINTERS, "*bf16") | {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
            types |= dict.fromkeys(("key_ptr", "value_ptr"), f"*{TYPE_NAMES[cache]}")
            types |= dict.fromkeys(("key_scales_ptr", "value_scales_ptr"), "*fp32" if quantized else "*bf16")
            types |= {"slots_ptr": "*i64", "num_heads": "i32", "num_kv_heads": "i32", "eps": "fp32", "largest": "fp32"}
            constants = {
                "HALF": head_dim // 2, "HALF_PADDED": triton.next_power_of_2(head_dim // 2), "SLOTS": 16,
                "HEADS": _HEADS, "NORMED": normed, "QUANTIZED": quantized,
            }  # fmt: skip
            yield specialization(
                f"rope_and_cache d{head_dim} {TYPE_NAMES[cache]}{' normed' if normed else ''}", _rope_and_cache_kernel,
                types, constants, (_WARPS, 1), min_capability=89 if cache == torch.float8_e4m3fn else 80,
                in_test=normed,
            )  # fmt: skip
    types = {"cache_ptr": "*i64", "sources_ptr": "*i64", "destinations_ptr": "*i64", "size": "i32"}
    yield specialization(
        "copy_blocks", _copy_blocks_kernel, types, {"BLOCK": _COPY_BLOCK}, (_WARPS, 1), aligned=("size",), in_test=True
    )
