"""BERT, RoBERTa and XLM-RoBERTa: encoders whose every token sees every other of its text.

LayerNorm stands behind each block (post-norm), so the last one is left to `hidden`, for the rows that need it.
Shapes: T tokens of the step, R rows that are wanted, D hidden, S 3 D, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from penstock.config.model import ModelConfig
from penstock.kernels.ops import Ops
from penstock.layers import AttentionMetadata, GeluMLP, KVCache, Weights

# Ours to the checkpoint's, below the family's prefix.
LAYER_WEIGHT_NAMES: Final = {
    "qkv": (
        "encoder.layer.{layer}.attention.self.query",
        "encoder.layer.{layer}.attention.self.key",
        "encoder.layer.{layer}.attention.self.value",
    ),
    "output": ("encoder.layer.{layer}.attention.output.dense",),
    "attention_norm": ("encoder.layer.{layer}.attention.output.LayerNorm",),
    "up": ("encoder.layer.{layer}.intermediate.dense",),
    "down": ("encoder.layer.{layer}.output.dense",),
    "mlp_norm": ("encoder.layer.{layer}.output.LayerNorm",),
}
# By architecture: the prefix of the body, and the two linears of a classifier (not below it, but for BERT's pooler).
PREFIXES: Final = {"BertModel": "bert.", "RobertaModel": "roberta.", "XLMRobertaModel": "roberta."}
CLASSIFIER_NAMES: Final = {
    "BertModel": ("bert.pooler.dense", "classifier"),
    "RobertaModel": ("classifier.dense", "classifier.out_proj"),
    "XLMRobertaModel": ("classifier.dense", "classifier.out_proj"),
}


class BertLayer:
    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        prefix = PREFIXES[config.architecture]
        names = {
            ours: [prefix + name.format(layer=layer) for name in theirs] for ours, theirs in LAYER_WEIGHT_NAMES.items()
        }
        hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        self.num_heads, self.scale = config.num_heads, config.head_dim**-0.5
        self.qkv = weights.linear(names["qkv"], [hidden] * 3, hidden, bias=True)
        self.output = weights.linear(names["output"], [hidden], hidden, bias=True)
        self.attention_norm = weights.layer_norm(names["attention_norm"][0], hidden, eps)
        self.mlp = GeluMLP(
            weights.linear(names["up"], [inner], hidden, bias=True),
            weights.linear(names["down"], [hidden], inner, bias=True),
        )
        self.mlp_norm = weights.layer_norm(names["mlp_norm"][0], hidden, eps)

    def forward(self, x_TD: Tensor, query_starts: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """[T, D] -> (the feed-forward block's output, its input): `mlp_norm` of their sum is the layer's output."""
        attended_TD = ops.full_attention(self.qkv(x_TD, ops), query_starts, self.num_heads, self.scale)
        x_TD = self.attention_norm(self.output(attended_TD, ops), ops, x_TD)
        return self.mlp(x_TD, ops), x_TD


class BertModel:
    """Also RoBERTa and XLM-RoBERTa, whose names and first position differ."""

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:  # noqa: ARG002 registry's
        prefix, hidden, eps = f"{PREFIXES[config.architecture]}embeddings.", config.hidden_size, config.rms_norm_eps
        self.first_position = config.first_position
        self.words = weights.embedding(f"{prefix}word_embeddings", config.vocab_size, hidden)
        num_positions = config.max_position_embeddings + config.first_position
        self.positions = weights.embedding(f"{prefix}position_embeddings", num_positions, hidden)
        self.types = weights.embedding(f"{prefix}token_type_embeddings", config.type_vocab_size, hidden)
        self.norm = weights.layer_norm(f"{prefix}LayerNorm", hidden, eps)
        self.layers = [BertLayer(config, layer, weights) for layer in range(config.num_layers)]
        if config.pooler.labels:
            dense, out = CLASSIFIER_NAMES[config.architecture]
            self.dense = weights.linear([dense], [hidden], hidden, bias=True)
            self.classifier = weights.linear([out], [len(config.pooler.labels)], hidden, bias=True)

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        kv_caches: Sequence[KVCache],  # noqa: ARG002 an encoder has none
        metadata: AttentionMetadata,
        ops: Ops,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and positions (int64) -> (x, residual), whose normalised sum is the last layer's output."""
        assert metadata.token_types is not None
        x_TD = self.words(token_ids_T, ops)
        x_TD += self.types(metadata.token_types, ops)
        x_TD = self.norm(self.positions(positions_T + self.first_position, ops), ops, x_TD)
        residual_TD = x_TD
        for index, layer in enumerate(self.layers):
            if index:
                residual_TD = self.layers[index - 1].mlp_norm(x_TD, ops, residual_TD)
            x_TD, residual_TD = layer.forward(residual_TD, metadata.query_starts, ops)
        return x_TD, residual_TD

    def hidden(self, x_RD: Tensor, residual_RD: Tensor, ops: Ops) -> Tensor:
        """Rows of what `forward` returned -> last hidden states [R, D]."""
        return self.layers[-1].mlp_norm(x_RD, ops, residual_RD)

    def logits(self, x_RD: Tensor, residual_RD: Tensor, ops: Ops) -> Tensor:
        """Rows (of first tokens) of what `forward` returned -> a classifier's logits [R, L] float32."""
        pooled_RD = torch.tanh(self.dense(self.hidden(x_RD, residual_RD, ops), ops))
        return self.classifier(pooled_RD, ops, torch.float32)
