"""Decoding: the context of a request is cut into pieces, which programs attend to at once and a second kernel folds.

Where a context is cut follows from its own length (and the window) alone, and the fold goes from the first piece to the
last, so a row's bits depend neither on the batch nor on how many pieces the launch had room for.

Limit: memory. A token of context is 2 G D elements, read once for all query heads that share a key/value head and for
all new tokens of the request; a piece of 256 slots leaves 4 (D + 2) bytes a query head, 3 % of what it read at
D = 128 and 4 heads to one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from penstock.kernels.kv_layout import QUANTIZED_DTYPES
from penstock.kernels.triton import configs
from penstock.kernels.triton.attention_tiles import TUNED_CACHES, TUNED_HEAD_SIZES, decode_tile, label, tile_name
from penstock.kernels.triton.attention_tiles import candidates as tile_candidates
from penstock.kernels.triton.kv_layout import scales_of
from penstock.kernels.triton.online_softmax import LOG2_E, attend_tiles
from penstock.kernels.triton.specialization import TYPE_NAMES, Specialization, specialization

if TYPE_CHECKING:
    from penstock.kernels.triton.attention import Attention
    from penstock.kernels.triton.configs import AttentionTile

# A piece is PIECE_SLOTS long, or twice, four times ... that, so that a context has at most MAX_PIECES: 64 pieces of 8
# heads fill 132 multiprocessors, and what is left to fold stays bounded however long the context.
PIECE_SLOTS: Final = 256
MAX_PIECES: Final = 64
FOLD: Final = 16  # pieces that the second kernel loads at once
# One long context gives every request of its step room for as many pieces, and the others' programs would begin for
# nothing. So many programs a multiprocessor share the work well; beyond, each takes several pieces. Not measured.
PROGRAMS_A_MULTIPROCESSOR: Final = 32


@triton.jit
def request_of(token, starts_ptr, num_requests):
    """The last request that begins at or before `token`."""
    low = 0
    high = num_requests
    while high - low > 1:
        middle = (low + high) // 2
        begins_before = tl.load(starts_ptr + middle) <= token
        low = tl.where(begins_before, middle, low)
        high = tl.where(begins_before, high, middle)
    return low


@triton.jit
def unit_of(
    unit, first_token, starts_ptr, lens_ptr, num_requests, window, PIECE: tl.constexpr, PIECES: tl.constexpr,
    TOKEN_UNITS: tl.constexpr,
):  # fmt: skip
    """(request, first token, tokens, context length, first slot seen, length of a piece) of a unit of decoding.

    A unit is a request, or with TOKEN_UNITS one token of one, the last of a context that ends with it.
    """
    if TOKEN_UNITS:
        begin = first_token + unit
        request = request_of(begin, starts_ptr, num_requests)
        query_len = 1
        context_len = tl.load(lens_ptr + request) - tl.load(starts_ptr + request + 1) + begin + 1
    else:
        request = unit
        begin = tl.load(starts_ptr + request)
        query_len = tl.load(starts_ptr + request + 1) - begin
        context_len = tl.load(lens_ptr + request)
    first_seen = 0
    span = context_len
    if window > 0:
        first_seen = tl.maximum(context_len - query_len - window + 1, 0)
        span = tl.minimum(context_len, window)
    length = span * 0 + PIECE
    while length * PIECES < span:
        length *= 2
    return request, begin, query_len, context_len, first_seen, length


@triton.jit(do_not_specialize=["table_width", "num_requests", "num_kv_heads", "first_token", "num_pieces", "window"])
def _decode_kernel(
    q_ptr, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, tables_ptr, lens_ptr, starts_ptr, sums_ptr,
    totals_ptr, q_stride, table_width, num_requests, num_kv_heads, first_token, num_pieces, scale, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, SLOTS: tl.constexpr, QUERY_LEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, QUANTIZED: tl.constexpr,
    WINDOWED: tl.constexpr, TOKEN_UNITS: tl.constexpr,
):  # fmt: skip
    """Pieces of one unit's context for the GROUP query heads of a key/value head. Bytes: 2 D a slot, read once.

    Leaves, for each row, head and piece, the sums [D] and (largest score, total), which fold_kernel puts together. The
    programs of a unit share its pieces, however many they are.
    """
    kv_head = tl.program_id(1)
    unit = tl.program_id(2)
    request, begin, query_len, context_len, first_seen, length = unit_of(
        unit, first_token, starts_ptr, lens_ptr, num_requests, window, PIECE, PIECES, TOKEN_UNITS
    )
    first_piece = first_seen // length
    count = tl.cdiv(context_len, length) - first_piece
    if (query_len > 0) & (query_len <= QUERY_LEN) & (tl.program_id(0) < count):
        rows = tl.arange(0, BLOCK_M)
        tokens = rows // GROUP
        heads = kv_head * GROUP + rows % GROUP
        valid = tokens < query_len
        dims = tl.arange(0, DIM_PADDED)
        mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
        q_at = (begin + tokens).to(tl.int64) * q_stride + heads * HEAD_DIM
        q = tl.load(q_ptr + q_at[:, None] + dims[None, :], mask=mask, other=0.0)
        out_rows = (unit.to(tl.int64) * QUERY_LEN + tokens) * (num_kv_heads * GROUP) + heads
        for piece in range(tl.program_id(0), count, tl.num_programs(0)):
            begin_at = (first_piece + piece) * length
            sums, largest, total = attend_tiles(
                q, tl.zeros((BLOCK_M, DIM_PADDED), tl.float32), tl.full((BLOCK_M,), -float("inf"), tl.float32),
                tl.zeros((BLOCK_M,), tl.float32), key_ptr, value_ptr, key_scales_ptr, value_scales_ptr,
                tables_ptr + request.to(tl.int64) * table_width, kv_head, num_kv_heads,
                context_len - query_len + tokens, tl.maximum(begin_at, first_seen // BLOCK_N * BLOCK_N),
                tl.minimum(begin_at + length, context_len), first_seen, scale, window, HEAD_DIM, DIM_PADDED, SLOTS,
                BLOCK_N, QUANTIZED, True, WINDOWED,
            )  # fmt: skip
            at = out_rows * num_pieces + piece
            tl.store(sums_ptr + at[:, None] * HEAD_DIM + dims[None, :], sums, mask=mask)
            tl.store(totals_ptr + at * 2, largest, mask=valid)
            tl.store(totals_ptr + at * 2 + 1, total, mask=valid)


@triton.jit(do_not_specialize=["num_requests", "num_heads", "first_token", "num_pieces", "window"])
def fold_kernel(
    sums_ptr, totals_ptr, sinks_ptr, lens_ptr, starts_ptr, out_ptr, num_requests, num_heads, first_token, num_pieces,
    window, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr, QUERY_LEN: tl.constexpr, PIECE: tl.constexpr,
    PIECES: tl.constexpr, FOLD: tl.constexpr, SINKS: tl.constexpr, TOKEN_UNITS: tl.constexpr,
):  # fmt: skip
    """Folds the pieces of one row and head into out [T, H * D]. Bytes: 4 (D + 2) a piece."""
    unit = tl.program_id(0) // QUERY_LEN
    index = tl.program_id(0) % QUERY_LEN
    head = tl.program_id(1)
    _, begin, query_len, context_len, first_seen, length = unit_of(
        unit, first_token, starts_ptr, lens_ptr, num_requests, window, PIECE, PIECES, TOKEN_UNITS
    )
    if (query_len <= QUERY_LEN) & (index < query_len) & (context_len > 0):
        count = tl.cdiv(context_len, length) - first_seen // length
        dims = tl.arange(0, DIM_PADDED)
        row = (tl.program_id(0).to(tl.int64) * num_heads + head) * num_pieces
        sums = tl.zeros((DIM_PADDED,), tl.float32)
        total = 0.0
        largest = -float("inf")
        if SINKS:
            largest = tl.load(sinks_ptr + head) * 1.4426950408889634
            total = 1.0
        for first in range(0, count, FOLD):
            pieces = first + tl.arange(0, FOLD)
            there = pieces < count
            piece_largest = tl.load(totals_ptr + (row + pieces) * 2, mask=there, other=-float("inf"))
            piece_total = tl.load(totals_ptr + (row + pieces) * 2 + 1, mask=there, other=0.0)
            at = (row + pieces)[:, None] * HEAD_DIM + dims[None, :]
            piece_sums = tl.load(sums_ptr + at, mask=there[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
            new_largest = tl.maximum(largest, tl.max(piece_largest, 0))
            base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
            factor = tl.exp2(largest - base)
            weights = tl.exp2(piece_largest - base)
            sums = sums * factor + tl.sum(piece_sums * weights[:, None], 0)
            total = total * factor + tl.sum(piece_total * weights, 0)
            largest = new_largest
        at = ((begin + index).to(tl.int64) * num_heads + head) * HEAD_DIM + dims
        tl.store(out_ptr + at, (sums / total).to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def num_pieces_of(max_context_len: int, window: int) -> int:
    """Pieces that a launch must have room for: none of its contexts is longer than max_context_len."""
    if window == 0:
        return min(-(-max_context_len // PIECE_SLOTS), MAX_PIECES)
    # A window may begin and end inside a piece.
    return min(-(-min(max_context_len, window) // PIECE_SLOTS), MAX_PIECES) + 2


def programs_of(pieces: int, others: int, multiprocessors: int) -> int:
    """Programs that share a unit's pieces for one key/value head, where there are so many others of such."""
    return min(pieces, max(PROGRAMS_A_MULTIPROCESSOR * multiprocessors // others, 1))


def decode(
    call: Attention, units: int, max_context_len: int, *, query_len: int = 1, first_token: int | None = None
) -> None:
    """Writes call.out for the requests of at most query_len tokens; with first_token, for `units` tokens from there."""
    (keys, values), (tables, lens, starts) = call.caches, call.tables
    num_heads, head_dim = call.q.shape[1:]
    num_kv_heads = keys.shape[1]
    group, padded = num_heads // num_kv_heads, max(triton.next_power_of_2(head_dim), 16)
    card = configs.of_device(call.q.device)
    tile, pieces = decode_tile(card, padded, keys.dtype), num_pieces_of(max_context_len, call.window)
    rows = units * query_len * num_heads * pieces
    sums = torch.empty((rows, head_dim), dtype=torch.float32, device=call.q.device)
    totals = torch.empty((rows, 2), dtype=torch.float32, device=call.q.device)
    token_units = first_token is not None
    programs = programs_of(pieces, num_kv_heads * units, card.multiprocessors)
    _decode_kernel[(programs, num_kv_heads, units)](
        call.q, keys, values, scales_of(keys), scales_of(values), tables, lens, starts, sums, totals,
        call.q.stride(0), tables.shape[1], tables.shape[0], num_kv_heads, first_token or 0, pieces,
        call.scale * LOG2_E, call.window, GROUP=group, HEAD_DIM=head_dim, DIM_PADDED=padded, SLOTS=call.slots,
        QUERY_LEN=query_len, BLOCK_M=max(triton.next_power_of_2(group * query_len), 16), BLOCK_N=tile.slots,
        PIECE=PIECE_SLOTS, PIECES=MAX_PIECES, QUANTIZED=keys.dtype in QUANTIZED_DTYPES, WINDOWED=call.window > 0,
        TOKEN_UNITS=token_units, num_warps=tile.num_warps, num_stages=configs.stages(tile.num_stages),
    )  # fmt: skip
    fold_kernel[(units * query_len, num_heads)](
        sums, totals, call.sinks, lens, starts, call.out, tables.shape[0], num_heads, first_token or 0, pieces,
        call.window, HEAD_DIM=head_dim, DIM_PADDED=padded, QUERY_LEN=query_len, PIECE=PIECE_SLOTS, PIECES=MAX_PIECES,
        FOLD=FOLD, SINKS=call.sinks is not None, TOKEN_UNITS=token_units, num_warps=4,
    )  # fmt: skip


def specializations() -> Iterator[Specialization]:
    """Head sizes 64 to 256, caches of 16 and 8 bits, 1, 4 and 8 query heads to a key/value head; a window; tokens."""
    for head_dim, group, query_len in ((64, 4, 1), (80, 1, 1), (96, 4, 1), (128, 4, 1), (128, 8, 4), (256, 8, 1)):
        for cache in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
            yield _decode_specialization((head_dim, group, query_len), cache, WINDOWED=head_dim == 256)
    yield _decode_specialization((128, 4, 1), torch.bfloat16, TOKEN_UNITS=True)
    for head_dim, sinks in ((64, True), (128, False), (256, False)):
        yield fold_specialization(head_dim, sinks=sinks)


def candidates() -> Iterator[Specialization]:
    """What may be tried on a card, four query heads to a key/value head."""
    for head_dim, cache, tile in itertools.product(TUNED_HEAD_SIZES, TUNED_CACHES, tile_candidates("decode")):
        found = _decode_specialization((head_dim, 4, 1), cache, tile)
        yield found._replace(name=label(tile_name("decode", head_dim, cache), tile))


_IN_TEST: Final = ((128, 1, torch.bfloat16), (64, 1, torch.int8))


def _decode_specialization(
    shape: tuple[int, int, int], cache: torch.dtype, tile: AttentionTile | None = None, **flags: bool
) -> Specialization:
    head_dim, group, query_len = shape
    padded = triton.next_power_of_2(head_dim)
    tile = decode_tile(configs.read("NVIDIA_H100.json"), padded, cache) if tile is None else tile
    constants = {
        "GROUP": group, "HEAD_DIM": head_dim, "DIM_PADDED": padded, "SLOTS": 16, "QUERY_LEN": query_len,
        "BLOCK_M": max(triton.next_power_of_2(group * query_len), 16), "BLOCK_N": tile.slots,
        "PIECE": PIECE_SLOTS, "PIECES": MAX_PIECES, "QUANTIZED": cache in QUANTIZED_DTYPES, "WINDOWED": False,
        "TOKEN_UNITS": False,
    }  # fmt: skip
    name = f"decode d{head_dim} g{group} q{query_len} {TYPE_NAMES[cache]}"
    return specialization(
        name + "".join(f" {flag.lower()}" for flag, on in flags.items() if on), _decode_kernel, _decode_types(cache),
        constants | flags, (tile.num_warps, tile.num_stages), aligned=("q_stride",),
        spills_allowed=query_len > 1 and cache in QUANTIZED_DTYPES,  # no step asks for it yet
        min_capability=89 if cache == torch.float8_e4m3fn else 80, in_test=(head_dim, query_len, cache) in _IN_TEST,
    )  # fmt: skip


def fold_specialization(head_dim: int, *, sinks: bool) -> Specialization:
    """fold_kernel for one head size."""
    types = dict.fromkeys(("sums_ptr", "totals_ptr", "sinks_ptr"), "*fp32") | {"out_ptr": "*bf16"}
    types |= dict.fromkeys(("lens_ptr", "starts_ptr"), "*i32")
    types |= dict.fromkeys(("num_requests", "num_heads", "first_token", "num_pieces", "window"), "i32")
    constants = {
        "HEAD_DIM": head_dim, "DIM_PADDED": triton.next_power_of_2(head_dim), "QUERY_LEN": 1, "PIECE": PIECE_SLOTS,
        "PIECES": MAX_PIECES, "FOLD": FOLD, "SINKS": sinks, "TOKEN_UNITS": False,
    }  # fmt: skip
    name = f"fold d{head_dim}{' sinks' if sinks else ''}"
    return specialization(name, fold_kernel, types, constants, (4, 1), in_test=sinks)


def _decode_types(cache: torch.dtype) -> dict[str, str]:
    types = dict.fromkeys(("tables_ptr", "lens_ptr", "starts_ptr"), "*i32") | {"q_ptr": "*bf16", "scale": "fp32"}
    types |= dict.fromkeys(("key_ptr", "value_ptr"), f"*{TYPE_NAMES[cache]}")
    scales = "*fp32" if cache in QUANTIZED_DTYPES else "*bf16"
    types |= dict.fromkeys(("key_scales_ptr", "value_scales_ptr"), scales)
    types |= dict.fromkeys(("sums_ptr", "totals_ptr"), "*fp32")
    names = ("q_stride", "table_width", "num_requests", "num_kv_heads", "first_token", "num_pieces", "window")
    return types | dict.fromkeys(names, "i32")
