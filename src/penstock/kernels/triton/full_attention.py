"""Attention of each token over all tokens of its own text, without a cache: encoders.

Limit: the matrix units, 4 D operations a pair of tokens and head; short texts: memory, 4 H D elements a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from penstock.kernels.triton.configs import AttentionTile, stages
from penstock.kernels.triton.online_softmax import LOG2_E, next_sums, product
from penstock.kernels.triton.prefill_attention import tile_of
from penstock.kernels.triton.specialization import Specialization, specialization

if TYPE_CHECKING:
    from torch import Tensor

# By padded head size.
TILES: Final = {
    16: AttentionTile(64, 64, 4, 3),
    32: AttentionTile(64, 64, 4, 3),
    64: AttentionTile(64, 64, 4, 3),
    128: AttentionTile(128, 64, 8, 3),
    256: AttentionTile(64, 32, 4, 3),
}


@triton.jit(do_not_specialize=["num_texts", "num_heads"])
def _full_attention_kernel(
    qkv_ptr, starts_ptr, out_ptr, num_texts, num_heads, scale, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens of a text and one head, over all tokens of that text. Operations: 4 D a pair."""
    head = tl.program_id(0)
    text, first = tile_of(tl.program_id(1), starts_ptr, num_texts, BLOCK_M)
    begin = tl.load(starts_ptr + text)
    length = tl.load(starts_ptr + text + 1) - begin
    if first < length:
        tokens = first + tl.arange(0, BLOCK_M)
        dims = tl.arange(0, DIM_PADDED)
        known = dims < HEAD_DIM
        width = num_heads * HEAD_DIM
        start = qkv_ptr + begin.to(tl.int64) * 3 * width + head * HEAD_DIM
        mask = (tokens < length)[:, None] & known[None, :]
        q = tl.load(start + tokens[:, None] * (3 * width) + dims[None, :], mask=mask, other=0.0)
        sums = tl.zeros((BLOCK_M, DIM_PADDED), tl.float32)
        largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for column in range(0, length, BLOCK_N):
            columns = column + tl.arange(0, BLOCK_N)
            there = columns < length
            at = columns[:, None] * (3 * width) + dims[None, :]
            keys = tl.load(start + width + at, mask=there[:, None] & known[None, :], other=0.0)
            values = tl.load(start + 2 * width + at, mask=there[:, None] & known[None, :], other=0.0)
            scores = product(q, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
            scores = tl.where(there[None, :], scores, -float("inf"))
            weights, factor, largest, total = next_sums(scores, largest, total)
            sums = product(weights.to(q.dtype), values, sums * factor[:, None])
        out = out_ptr + begin.to(tl.int64) * width + head * HEAD_DIM + tokens[:, None] * width + dims[None, :]
        tl.store(out, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def full_attention(qkv_TS: Tensor, query_starts: Tensor, num_heads: int, scale: float) -> Tensor:
    """See Ops.full_attention. A text is shorter than 2^31 / (3 H D) tokens."""
    tokens, width = qkv_TS.shape
    assert qkv_TS.is_contiguous() and width % (3 * num_heads) == 0 and scale > 0.0, (qkv_TS.shape, num_heads)
    assert query_starts.dtype is torch.int32 and query_starts.is_contiguous(), query_starts.dtype
    head_dim = width // (3 * num_heads)
    padded = max(triton.next_power_of_2(head_dim), 16)
    tile, num_texts = TILES[padded], query_starts.shape[0] - 1
    out = torch.empty((tokens, width // 3), dtype=qkv_TS.dtype, device=qkv_TS.device)
    if tokens:
        _full_attention_kernel[(num_heads, tokens // tile.rows + num_texts)](
            qkv_TS, query_starts, out, num_texts, num_heads, scale * LOG2_E, HEAD_DIM=head_dim, DIM_PADDED=padded,
            BLOCK_M=tile.rows, BLOCK_N=tile.slots, num_warps=tile.num_warps, num_stages=stages(tile.num_stages),
        )  # fmt: skip
    return out


def specializations() -> Iterator[Specialization]:
    """Heads of 32 (MiniLM), 64 (BERT) and 128."""
    types = {"qkv_ptr": "*bf16", "starts_ptr": "*i32", "out_ptr": "*bf16", "scale": "fp32"}
    types |= dict.fromkeys(("num_texts", "num_heads"), "i32")
    for head_dim in (32, 64, 128):
        tile = TILES[head_dim]
        constants = {"HEAD_DIM": head_dim, "DIM_PADDED": head_dim, "BLOCK_M": tile.rows, "BLOCK_N": tile.slots}
        launch = (tile.num_warps, tile.num_stages)
        yield specialization(
            f"full_attention d{head_dim}", _full_attention_kernel, types, constants, launch, in_test=head_dim == 64
        )
