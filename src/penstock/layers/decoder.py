"""The layers of a decoder, one after another.

Shapes: T tokens, R requests of the step, D hidden, E head size / 2, W blocks a table row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.kernels.rounded import ActivationForm, Activations
from penstock.layers.attention import Attention, AttentionMetadata, KVCache
from penstock.layers.norm import RMSNorm


class FeedForward(Protocol):
    def __call__(self, x_TD: Activations, ops: Ops) -> Tensor:
        """[T, D] -> [T, D]. x: in the block's `form`."""
        ...

    def form(self, ops: Ops) -> ActivationForm | None:
        """See Linear.form."""
        ...


class DecoderLayer:
    """Attention and a feed-forward block, each of the normed residual."""

    def __init__(self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: FeedForward) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(
        self,
        x_TD: Tensor | None,
        residual_TD: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        ops: Ops,
    ) -> Tensor:
        """Adds x (None in the first layer) and the attention to the residual, in place. Returns what is to add next."""
        addend_TD, sum_TD = (residual_TD, None) if x_TD is None else (x_TD, residual_TD)
        normed_TD = self.attention_norm.into(self.attention.qkv.form(ops), addend_TD, sum_TD, ops)
        attended_TD = self.attention(normed_TD, rotary, kv_cache, metadata, ops)
        normed_TD = self.mlp_norm.into(self.mlp.form(ops), attended_TD, residual_TD, ops)
        return self.mlp(normed_TD, ops)


class DecoderLayers(tuple[DecoderLayer, ...]):
    """All layers of a model, which an op table may remember as one (Ops.recordings)."""

    __slots__ = ()

    def run(
        self,
        residual_TD: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv_caches: Sequence[KVCache],
        metadata: AttentionMetadata,
        ops: Ops,
    ) -> Tensor:
        """What is to be added to the residual after the last layer [T, D]; the residual changes in place."""
        tables = (metadata.slot_mapping, metadata.block_tables, metadata.context_lens, metadata.query_starts)
        step, caches = (*rotary, *tables), [part for cache in kv_caches for part in cache]
        x_TD = None if ops.recordings is None else ops.recordings.run(self, residual_TD, step, caches)
        return self(ops, residual_TD, step, caches) if x_TD is None else x_TD

    def __call__(self, ops: Ops, residual_TD: Tensor, step: tuple[Tensor, ...], caches: Sequence[Tensor]) -> Tensor:
        cos_TE, sin_TE, slot_mapping_T, block_tables_RW, context_lens_R, query_starts = step
        metadata = AttentionMetadata(query_starts, context_lens_R, block_tables_RW, slot_mapping_T)
        x_TD: Tensor | None = None
        for layer, key, value in zip(self, caches[::2], caches[1::2], strict=True):
            x_TD = layer.forward(x_TD, residual_TD, (cos_TE, sin_TE), KVCache(key, value), metadata, ops)
        assert x_TD is not None
        return x_TD
