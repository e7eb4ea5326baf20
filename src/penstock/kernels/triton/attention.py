"""Causal attention of a step's new tokens over the paged cache: decoded (context in pieces) or prefilled (in tiles).

A request with few new tokens is decoded (decode_attention.py), a longer one prefilled (prefill_attention.py). Which of
the two, and every row's order of summation, follow from the request alone, so its bits do not depend on the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from penstock.kernels.kv_layout import MAX_HEAD_DIM, QUANTIZED_DTYPES
from penstock.kernels.triton.decode_attention import decode
from penstock.kernels.triton.kv_layout import num_slots
from penstock.kernels.triton.prefill_attention import prefill

if TYPE_CHECKING:
    from torch import Tensor

_INVARIANT_TOKENS: Final = 256  # tokens of one launch where every token is decoded: bounds the workspace


class StepBounds(NamedTuple):
    """What the host knows of a step without asking the device; of a graph, the largest that it may meet.

    A request of at most decode_query_len new tokens is decoded. row_invariant: every token is decoded, so that its
    bits do not depend on how its request was cut into steps either; a prefill then reads its context once a token.
    """

    max_context_len: int
    max_query_len: int
    decode_query_len: int = 1
    row_invariant: bool = False


def bounds_of(q_THD: Tensor, key_cache: Tensor, block_tables_RW: Tensor, *, row_invariant: bool = False) -> StepBounds:
    """Those that the shapes allow: at most W blocks of context, and T - R + 1 new tokens of a request."""
    tokens, _, head_dim = q_THD.shape
    requests, num_blocks = block_tables_RW.shape
    max_context_len = num_blocks * num_slots(key_cache, head_dim)
    return StepBounds(max_context_len, max(tokens - requests + 1, 1), row_invariant=row_invariant)


class Attention(NamedTuple):
    """One call: what both ways need. window: 0, or how many positions a row sees. slots: of a block."""

    q: Tensor  # [T, H, D], of any token stride
    caches: tuple[Tensor, Tensor]  # keys, values
    tables: tuple[Tensor, Tensor, Tensor]  # block tables [R, W], context lengths [R], query starts [R + 1], int32
    scale: float
    window: int
    sinks: Tensor | None  # [H] float32
    slots: int
    out: Tensor  # [T, H * D]


def paged_attention(
    q_THD: Tensor,
    caches: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    scale: float,
    sliding_window: int = 0,
    sinks_H: Tensor | None = None,
    bounds: StepBounds | None = None,
) -> Tensor:
    """See Ops.paged_attention. caches: (keys, values). tables: (block tables, context lengths, query starts).

    sinks: for each query head the score (float32, scaled already) of a key without a value, which every row sees.
    bounds: by default `bounds_of` the shapes. A request of context length 0 or without new tokens is passed over:
    the rows of tokens that no request owns are left as they are in the result.
    """
    block_tables_RW = tables[0]
    tokens, num_heads, head_dim = q_THD.shape
    requests = block_tables_RW.shape[0]
    _check(q_THD, caches, tables, sinks_H)
    assert scale > 0.0 and sliding_window >= 0, (scale, sliding_window)
    if bounds is None:
        bounds = bounds_of(q_THD, caches[0], block_tables_RW)
    out = torch.empty((tokens, num_heads * head_dim), dtype=q_THD.dtype, device=q_THD.device)
    if tokens == 0:
        return out
    call = Attention(q_THD, caches, tables, scale, sliding_window, sinks_H, num_slots(caches[0], head_dim), out)
    if bounds.row_invariant:
        for first_token in range(0, tokens, _INVARIANT_TOKENS):
            count = min(tokens - first_token, _INVARIANT_TOKENS)
            decode(call, count, bounds.max_context_len, first_token=first_token)
        return out
    decode(call, requests, bounds.max_context_len, query_len=bounds.decode_query_len)
    if bounds.max_query_len > bounds.decode_query_len:
        prefill(call, bounds.decode_query_len)
    return out


def _check(
    q_THD: Tensor, caches: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor, Tensor], sinks_H: Tensor | None
) -> None:
    (keys, values), (block_tables_RW, context_lens_R, query_starts) = caches, tables
    _, num_heads, head_dim = q_THD.shape
    _, head_stride, dim_stride = q_THD.stride()
    assert dim_stride == 1 and head_stride == head_dim <= MAX_HEAD_DIM, (q_THD.shape, q_THD.stride())
    assert num_heads % keys.shape[1] == 0, (num_heads, keys.shape)
    assert keys.dtype is values.dtype and (keys.dtype is q_THD.dtype or keys.dtype in QUANTIZED_DTYPES), keys.dtype
    assert keys.shape == values.shape and keys.is_contiguous() and values.is_contiguous(), (keys.shape, values.shape)
    assert block_tables_RW.dtype is context_lens_R.dtype is query_starts.dtype is torch.int32
    assert block_tables_RW.is_contiguous() and context_lens_R.is_contiguous() and query_starts.is_contiguous()
    requests = block_tables_RW.shape[0]
    assert context_lens_R.shape == (requests,) and query_starts.shape == (requests + 1,), query_starts.shape
    assert sinks_H is None or (sinks_H.dtype is torch.float32 and sinks_H.shape == (num_heads,)), sinks_H
