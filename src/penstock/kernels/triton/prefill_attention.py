"""Prefill: causal attention in tiles of BLOCK_M rows, tokens times the query heads that share a key/value head.

Limit: the matrix units. 4 D operations for each pair of a query head's row and a slot that it sees. Keys and values
are read once for BLOCK_M rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from penstock.kernels.kv_layout import QUANTIZED_DTYPES
from penstock.kernels.triton import configs
from penstock.kernels.triton.attention_tiles import TUNED_CACHES, TUNED_HEAD_SIZES, label, prefill_tile, tile_name
from penstock.kernels.triton.attention_tiles import candidates as tile_candidates
from penstock.kernels.triton.kv_layout import scales_of
from penstock.kernels.triton.online_softmax import LOG2_E, attend_tiles
from penstock.kernels.triton.specialization import TYPE_NAMES, Specialization, specialization

if TYPE_CHECKING:
    from penstock.kernels.triton.attention import Attention
    from penstock.kernels.triton.configs import AttentionTile


@triton.jit
def tile_of(tile, starts_ptr, num_requests, BLOCK_Q: tl.constexpr):
    """(request, first token within it) of a tile: request r's tiles begin at query_starts[r] // BLOCK_Q + r.

    Some tiles begin behind their request's end: they have no work.
    """
    low = 0
    high = num_requests
    while high - low > 1:
        middle = (low + high) // 2
        begins_before = tl.load(starts_ptr + middle) // BLOCK_Q + middle <= tile
        low = tl.where(begins_before, middle, low)
        high = tl.where(begins_before, high, middle)
    return low, (tile - tl.load(starts_ptr + low) // BLOCK_Q - low) * BLOCK_Q


@triton.jit(do_not_specialize=["table_width", "num_requests", "num_kv_heads", "decode_query_len", "window"])
def _prefill_kernel(
    q_ptr, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, sinks_ptr, tables_ptr, lens_ptr, starts_ptr, out_ptr,
    q_stride, table_width, num_requests, num_kv_heads, decode_query_len, scale, window, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, QUANTIZED: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One tile of a request's new tokens for a key/value head's GROUP query heads. Operations: 4 D a pair seen."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    # The last tiles have the longest contexts: they go first, so that none of them is left over at the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    request, first = tile_of(tile, starts_ptr, num_requests, BLOCK_Q)
    begin = tl.load(starts_ptr + request)
    query_len = tl.load(starts_ptr + request + 1) - begin
    context_len = tl.load(lens_ptr + request)
    if (query_len > decode_query_len) & (first < query_len):
        rows = tl.arange(0, BLOCK_M)
        tokens = first + rows // GROUP
        heads = kv_head * GROUP + rows % GROUP
        valid = (rows < BLOCK_Q * GROUP) & (tokens < query_len)
        dims = tl.arange(0, DIM_PADDED)
        mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
        q_at = (begin + tokens).to(tl.int64) * q_stride + heads * HEAD_DIM
        q = tl.load(q_ptr + q_at[:, None] + dims[None, :], mask=mask, other=0.0)

        first_position = context_len - query_len + first
        positions = first_position + rows // GROUP
        end = tl.minimum(first_position + BLOCK_Q, context_len)
        largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        if SINKS:
            largest = tl.load(sinks_ptr + heads, mask=valid, other=0.0) * 1.4426950408889634
            total += 1.0
        sums = tl.zeros((BLOCK_M, DIM_PADDED), tl.float32)
        table_ptr = tables_ptr + request.to(tl.int64) * table_width
        first_seen = 0
        masked_from = 0
        if WINDOWED:
            first_seen = tl.maximum(first_position - window + 1, 0)
            masked_from = first_seen // BLOCK_N * BLOCK_N
        else:
            # Every row sees the tiles that end at or before the first row's position.
            masked_from = (first_position + 1) // BLOCK_N * BLOCK_N
            sums, largest, total = attend_tiles(
                q, sums, largest, total, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, table_ptr, kv_head,
                num_kv_heads, positions, 0, masked_from, 0, scale, window, HEAD_DIM, DIM_PADDED, SLOTS, BLOCK_N,
                QUANTIZED, False, False,
            )  # fmt: skip
        sums, largest, total = attend_tiles(
            q, sums, largest, total, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, table_ptr, kv_head,
            num_kv_heads, positions, masked_from, end, first_seen, scale, window, HEAD_DIM, DIM_PADDED, SLOTS, BLOCK_N,
            QUANTIZED, True, WINDOWED,
        )  # fmt: skip
        out_at = ((begin + tokens).to(tl.int64) * (num_kv_heads * GROUP) + heads) * HEAD_DIM
        out = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_at[:, None] + dims[None, :], out, mask=mask)


def prefill(call: Attention, decode_query_len: int) -> None:
    """Writes call.out for the requests of more than decode_query_len tokens."""
    (keys, values), (tables, lens, starts) = call.caches, call.tables
    tokens, num_heads, head_dim = call.q.shape
    num_kv_heads, requests = keys.shape[1], tables.shape[0]
    group, padded = num_heads // num_kv_heads, max(triton.next_power_of_2(head_dim), 16)
    size = prefill_tile(configs.of_device(call.q.device), padded, keys.dtype)
    rows = max(size.rows, triton.next_power_of_2(group))
    num_tiles = tokens // (rows // group) + requests
    _prefill_kernel[(num_kv_heads, num_tiles)](
        call.q, keys, values, scales_of(keys), scales_of(values), call.sinks, tables, lens, starts, call.out,
        call.q.stride(0), tables.shape[1], requests, num_kv_heads, decode_query_len, call.scale * LOG2_E, call.window,
        GROUP=group, HEAD_DIM=head_dim, DIM_PADDED=padded, SLOTS=call.slots, BLOCK_M=rows, BLOCK_N=size.slots,
        QUANTIZED=keys.dtype in QUANTIZED_DTYPES, WINDOWED=call.window > 0, SINKS=call.sinks is not None,
        num_warps=size.num_warps, num_stages=configs.stages(size.num_stages),
    )  # fmt: skip


def specializations() -> Iterator[Specialization]:
    """Head sizes 64 to 256, caches of 16 and 8 bits, a window, sinks, 1 to 8 query heads to a key/value head."""
    card = configs.read("NVIDIA_H100.json")
    for head_dim, group, windowed in ((64, 8, True), (80, 1, False), (96, 4, False), (128, 4, False), (256, 8, True)):
        for cache in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
            size = prefill_tile(card, triton.next_power_of_2(head_dim), cache)
            found = _specialization((head_dim, group), cache, size, WINDOWED=windowed, SINKS=head_dim == 64)
            yield found._replace(in_test=(head_dim, cache) in ((128, torch.bfloat16), (64, torch.int8)))


def candidates() -> Iterator[Specialization]:
    """What may be tried on a card, four query heads to a key/value head."""
    for head_dim, cache, tile in itertools.product(TUNED_HEAD_SIZES, TUNED_CACHES, tile_candidates("prefill")):
        found = _specialization((head_dim, 4), cache, tile, WINDOWED=False, SINKS=False)
        yield found._replace(name=label(tile_name("prefill", head_dim, cache), tile))


def _specialization(shape: tuple[int, int], cache: torch.dtype, tile: AttentionTile, **flags: bool) -> Specialization:
    """shape: (head size, query heads to a key/value head)."""
    head_dim, group = shape
    constants = {
        "GROUP": group, "HEAD_DIM": head_dim, "DIM_PADDED": triton.next_power_of_2(head_dim), "SLOTS": 16,
        "BLOCK_M": tile.rows, "BLOCK_N": tile.slots, "QUANTIZED": cache in QUANTIZED_DTYPES,
    }  # fmt: skip
    return specialization(
        f"prefill d{head_dim} g{group} {TYPE_NAMES[cache]}", _prefill_kernel, _types(cache), constants | flags,
        (tile.num_warps, tile.num_stages), aligned=("q_stride",),
        min_capability=89 if cache == torch.float8_e4m3fn else 80,
    )  # fmt: skip


def _types(cache: torch.dtype) -> dict[str, str]:
    types = dict.fromkeys(("tables_ptr", "lens_ptr", "starts_ptr"), "*i32") | {"sinks_ptr": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("key_ptr", "value_ptr"), f"*{TYPE_NAMES[cache]}")
    types |= dict.fromkeys(("q_ptr", "out_ptr"), "*bf16")
    scales = "*fp32" if cache in QUANTIZED_DTYPES else "*bf16"
    types |= dict.fromkeys(("key_scales_ptr", "value_scales_ptr"), scales)
    names = ("q_stride", "table_width", "num_requests", "num_kv_heads", "decode_query_len", "window")
    return types | dict.fromkeys(names, "i32")
