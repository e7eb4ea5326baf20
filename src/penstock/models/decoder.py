"""A decoder: what is the same in every family. A family is its layer, and what its weights are called.

Shapes: T tokens of the step, R rows that need logits, D hidden, E head size / 2, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from penstock.config.model import ModelConfig
from penstock.kernels.ops import Ops
from penstock.layers import AttentionMetadata, DecoderLayer, DecoderLayers, KVCache, RotaryTable, Weights
from penstock.models.heads import output_head

WEIGHT_NAMES: Final = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


class Decoder:
    def __init__(
        self,
        make_layer: Callable[[ModelConfig, int, Weights], DecoderLayer],
        config: ModelConfig,
        weights: Weights,
        max_model_len: int,
    ) -> None:
        self.embedding = weights.embedding(WEIGHT_NAMES["embedding"], config.vocab_size, config.hidden_size)
        self.head = output_head(config, weights, WEIGHT_NAMES["head"], self.embedding)
        self.layers = DecoderLayers(make_layer(config, layer, weights) for layer in range(config.num_layers))
        self.norm = weights.norm(WEIGHT_NAMES["norm"], config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(
            config.rope, config.head_dim, config.max_position_embeddings, max_model_len, weights.device
        )

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        kv_caches: Sequence[KVCache],
        metadata: AttentionMetadata,
        ops: Ops,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and positions (int64) -> (x, residual), whose sum is the last layer's output, each [T, D]."""
        rotary = self.rotary(positions_T)
        residual_TD = self.embedding(token_ids_T, ops)
        return self.layers.run(residual_TD, rotary, kv_caches, metadata, ops), residual_TD

    def hidden(self, x_RD: Tensor, residual_RD: Tensor, ops: Ops) -> Tensor:
        """Rows of what `forward` returned -> last hidden states [R, D]. Overwrites the residual."""
        return self.norm.add(x_RD, residual_RD, ops)

    def logits(self, x_RD: Tensor, residual_RD: Tensor, ops: Ops) -> Tensor:
        """Rows of what `forward` returned -> logits [R, V] float32. Overwrites the residual."""
        assert self.head is not None
        return self.head(self.norm.into(self.head.form(ops), x_RD, residual_RD, ops), ops, torch.float32)
