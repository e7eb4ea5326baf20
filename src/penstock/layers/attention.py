"""Grouped-query attention over the paged key/value cache.

Shapes: T tokens, R requests of the step, D hidden, H query heads, G key/value heads, E head size, W blocks a table row.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.kernels.rounded import Activations
from penstock.layers.linear import Linear
from penstock.layers.norm import RMSNorm


class KVCache(NamedTuple):
    """One layer's keys and values, in the blocked layouts that kernels/ops.py describes."""

    key: Tensor
    value: Tensor


class AttentionMetadata(NamedTuple):
    """Which tokens of the step belong to whom, and where their context lies.

    Request r owns tokens query_starts[r] to query_starts[r + 1], the last of its context_lens[r] positions.
    slot_mapping: for each token the slot (block id * 16 + offset) that takes its key and value.
    token_types: for each token whether it is of the first or the second text of a pair; None for decoders.
    """

    query_starts: Tensor  # [R + 1] int32
    context_lens: Tensor  # [R] int32
    block_tables: Tensor  # [R, W] int32
    slot_mapping: Tensor  # [T] int64
    token_types: Tensor | None = None  # [T] int64


class Attention:
    """qkv projection, rotary embedding, cache write, attention, output projection.

    q_norm, k_norm: per-head norms before the rotation (Qwen3). sliding_window: tokens, 0 for full attention.
    """

    __slots__ = ("head_dim", "num_heads", "output", "qk_norm", "qkv", "scale", "window")

    def __init__(
        self,
        qkv: Linear,
        output: Linear,
        heads: tuple[int, int],
        sliding_window: int = 0,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        """heads: (query heads, head size)."""
        self.qkv = qkv
        self.output = output
        self.num_heads, self.head_dim = heads
        self.scale = self.head_dim**-0.5
        self.window = sliding_window
        self.qk_norm = None
        if q_norm is not None and k_norm is not None:
            self.qk_norm = (q_norm.weight_K, k_norm.weight_K, q_norm.eps)

    def __call__(
        self,
        x_TD: Activations,
        rotary: tuple[Tensor, Tensor],
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        ops: Ops,
    ) -> Tensor:
        """[T, D] -> [T, D]. rotary: cosines and sines [T, E / 2] of the tokens' positions. x: may be in qkv's form."""
        qkv_TS = self.qkv(x_TD, ops)
        cos_TE, sin_TE = rotary
        ops.rope_and_cache(qkv_TS, cos_TE, sin_TE, kv_cache.key, kv_cache.value, metadata.slot_mapping, self.qk_norm)
        q_THE = qkv_TS[:, : self.num_heads * self.head_dim].view(-1, self.num_heads, self.head_dim)
        attended_TS = ops.paged_attention(
            q_THE,
            kv_cache.key,
            kv_cache.value,
            metadata.block_tables,
            metadata.context_lens,
            metadata.query_starts,
            self.scale,
            self.window,
        )
        return self.output(attended_TS, ops)
