"""Multi-head latent attention (DeepSeek), decoded in the latent space: the weights are absorbed into q and the output.

A token of context is one vector that all heads share: the latent (512), which is key and value, then the rotated part
of the key (64). Context is cut into pieces and folded as in decode_attention.py.

Limit: with 128 heads 2 (576 + 512) * 128 operations for 1152 bytes, 242 a byte: an H200 balances at about 180, so the
matrix units; below 96 heads memory. Programs that share a context's piece read it through L2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from penstock.kernels.triton import decode_attention
from penstock.kernels.triton.configs import stages
from penstock.kernels.triton.decode_attention import fold_kernel, fold_specialization, num_pieces_of, unit_of
from penstock.kernels.triton.online_softmax import LOG2_E, next_sums, product
from penstock.kernels.triton.specialization import Specialization, specialization

if TYPE_CHECKING:
    from torch import Tensor

LATENT_DIM: Final = 512
ROPE_DIM: Final = 64
_WIDTH: Final = LATENT_DIM + ROPE_DIM
_BLOCK_N: Final = 32
_STAGES: Final = 4
_COPY_WARPS: Final = 4


@triton.jit(do_not_specialize=["table_width", "num_requests", "num_heads", "num_pieces"])
def _mla_decode_kernel(
    q_ptr, cache_ptr, tables_ptr, lens_ptr, starts_ptr, sums_ptr, totals_ptr, table_width, num_requests, num_heads,
    num_pieces, scale, LATENT: tl.constexpr, ROPE: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One piece of a request's context for HEADS heads of one new token: sums [LATENT] and (largest score, total)."""
    request, begin, query_len, context_len, _, length = unit_of(
        tl.program_id(2), 0, starts_ptr, lens_ptr, num_requests, 0, PIECE, PIECES, False
    )
    piece_begin = tl.program_id(0) * length
    piece_end = tl.minimum(piece_begin + length, context_len)
    if (query_len == 1) & (piece_begin < piece_end):
        heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        valid = heads < num_heads
        latent, rope = tl.arange(0, LATENT), tl.arange(0, ROPE)
        q_at = (begin.to(tl.int64) * num_heads + heads)[:, None] * (LATENT + ROPE)
        q_latent = tl.load(q_ptr + q_at + latent[None, :], mask=valid[:, None], other=0.0)
        q_rope = tl.load(q_ptr + q_at + LATENT + rope[None, :], mask=valid[:, None], other=0.0)
        sums = tl.zeros((HEADS, LATENT), tl.float32)
        largest = tl.full((HEADS,), -float("inf"), tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        table_ptr = tables_ptr + request.to(tl.int64) * table_width
        for start in range(piece_begin, piece_end, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            there = columns < piece_end
            blocks = tl.load(table_ptr + columns // SLOTS, mask=there, other=0)
            rows = cache_ptr + (blocks.to(tl.int64) * SLOTS + columns % SLOTS)[:, None] * (LATENT + ROPE)
            keys = tl.load(rows + latent[None, :], mask=there[:, None], other=0.0)
            key_ropes = tl.load(rows + LATENT + rope[None, :], mask=there[:, None], other=0.0)
            scores = product(q_rope, tl.trans(key_ropes), tl.zeros((HEADS, BLOCK_N), tl.float32))
            scores = product(q_latent, tl.trans(keys), scores) * scale
            scores = tl.where(there[None, :], scores, -float("inf"))
            weights, factor, largest, total = next_sums(scores, largest, total)
            sums = product(weights.to(keys.dtype), keys, sums * factor[:, None])
        at = (tl.program_id(2).to(tl.int64) * num_heads + heads) * num_pieces + tl.program_id(0)
        tl.store(sums_ptr + at[:, None] * LATENT + latent[None, :], sums, mask=valid[:, None])
        tl.store(totals_ptr + at * 2, largest, mask=valid)
        tl.store(totals_ptr + at * 2 + 1, total, mask=valid)


@triton.jit
def _mla_cache_kernel(latent_ptr, cache_ptr, slots_ptr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr):
    """Bytes: a token's vector read and written."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, WIDTH_PADDED)
    slot = tl.load(slots_ptr + token)
    vector = tl.load(latent_ptr + token * WIDTH + dims, mask=dims < WIDTH, other=0.0)
    tl.store(cache_ptr + slot * WIDTH + dims, vector, mask=(dims < WIDTH) & (slot >= 0))


def _tile(num_heads: int) -> tuple[int, int]:
    """(heads of one program, its warps): the more heads, the fewer programs that read a context again, through L2."""
    return (16, 4) if num_heads <= 16 else (32, 8)


def mla_decode(
    q_THD: Tensor, latent_cache: Tensor, tables: tuple[Tensor, Tensor, Tensor], scale: float, max_context_len: int
) -> Tensor:
    """Attention of one new token a request over its latent context -> [T, H, 512], of q's dtype.

    q [T, H, 576]: the query times the absorbed key weight (512), then its rotated part (64). latent_cache [B, S, 576].
    tables: (block tables [R, W], context lengths [R], query starts [R + 1]), int32. A request without a new token, or
    with more than one, is passed over.
    """
    block_tables, lens, starts = tables
    tokens, num_heads, width = q_THD.shape
    requests = block_tables.shape[0]
    assert width == _WIDTH == latent_cache.shape[2] and q_THD.dtype is latent_cache.dtype, (q_THD.shape, q_THD.dtype)
    assert q_THD.is_contiguous() and latent_cache.is_contiguous() and block_tables.is_contiguous()
    assert block_tables.dtype is lens.dtype is starts.dtype is torch.int32
    out = torch.empty((tokens, num_heads, LATENT_DIM), dtype=q_THD.dtype, device=q_THD.device)
    if tokens == 0:
        return out
    pieces = num_pieces_of(max_context_len, 0)
    heads, warps = _tile(num_heads)
    piece_slots, max_pieces = decode_attention.PIECE_SLOTS, decode_attention.MAX_PIECES
    sums = torch.empty((requests * num_heads * pieces, LATENT_DIM), dtype=torch.float32, device=q_THD.device)
    totals = torch.empty((requests * num_heads * pieces, 2), dtype=torch.float32, device=q_THD.device)
    _mla_decode_kernel[(pieces, triton.cdiv(num_heads, heads), requests)](
        q_THD, latent_cache, block_tables, lens, starts, sums, totals, block_tables.shape[1], requests, num_heads,
        pieces, scale * LOG2_E, LATENT=LATENT_DIM, ROPE=ROPE_DIM, SLOTS=latent_cache.shape[1], HEADS=heads,
        BLOCK_N=_BLOCK_N, PIECE=piece_slots, PIECES=max_pieces, num_warps=warps, num_stages=stages(_STAGES),
    )  # fmt: skip
    fold_kernel[(requests, num_heads)](
        sums, totals, None, lens, starts, out, requests, num_heads, 0, pieces, 0, HEAD_DIM=LATENT_DIM,
        DIM_PADDED=LATENT_DIM, QUERY_LEN=1, PIECE=piece_slots, PIECES=max_pieces, FOLD=decode_attention.FOLD,
        SINKS=False, TOKEN_UNITS=False, num_warps=4,
    )  # fmt: skip
    return out


def mla_cache(latent_TD: Tensor, latent_cache: Tensor, slot_mapping_T: Tensor) -> None:
    """Writes each token's vector [576] to its slot (int64, block * S + offset); a negative one is not written."""
    tokens, width = latent_TD.shape
    assert latent_TD.is_contiguous() and latent_cache.is_contiguous() and latent_TD.dtype is latent_cache.dtype
    assert latent_cache.shape[2] == width and slot_mapping_T.dtype is torch.int64, (latent_cache.shape, width)
    if tokens:
        _mla_cache_kernel[(tokens,)](
            latent_TD, latent_cache, slot_mapping_T, WIDTH=width, WIDTH_PADDED=triton.next_power_of_2(width),
            num_warps=_COPY_WARPS,
        )  # fmt: skip


def specializations() -> Iterator[Specialization]:
    """DeepSeek's sizes, and the fold of its latent."""
    types = dict.fromkeys(("tables_ptr", "lens_ptr", "starts_ptr"), "*i32")
    types |= {"q_ptr": "*bf16", "cache_ptr": "*bf16", "sums_ptr": "*fp32", "totals_ptr": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("table_width", "num_requests", "num_heads", "num_pieces"), "i32")
    for num_heads in (16, 128):
        heads, warps = _tile(num_heads)
        constants: dict[str, object] = {
            "LATENT": LATENT_DIM, "ROPE": ROPE_DIM, "SLOTS": 16, "HEADS": heads, "BLOCK_N": _BLOCK_N,
            "PIECE": decode_attention.PIECE_SLOTS, "PIECES": decode_attention.MAX_PIECES,
        }  # fmt: skip
        yield specialization(
            f"mla_decode h{num_heads}", _mla_decode_kernel, types, constants, (warps, _STAGES), in_test=True
        )
    yield fold_specialization(LATENT_DIM, sinks=False)
    types = {"latent_ptr": "*bf16", "cache_ptr": "*bf16", "slots_ptr": "*i64"}
    constants = {"WIDTH": _WIDTH, "WIDTH_PADDED": 1024}
    yield specialization("mla_cache", _mla_cache_kernel, types, constants, (_COPY_WARPS, 1), in_test=True)
