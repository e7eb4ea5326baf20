"""Qwen2-MoE and Qwen3-MoE: Qwen2 and Qwen3 with mixtures of experts; Qwen2's have an expert for all tokens besides.

A checkpoint may keep a plain feed-forward block in some layers.

Shapes: T tokens of the step, R rows that need logits, D hidden, E head size / 2, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from penstock.config.model import ModelConfig
from penstock.kernels.ops import Ops
from penstock.layers import (
    Attention,
    AttentionMetadata,
    DecoderLayers,
    ExpertsMLP,
    GatedMLP,
    KVCache,
    RotaryTable,
    SharedExpert,
    Weights,
)
from penstock.models.heads import output_head

# Ours to the checkpoint's: several names are fused into one linear, in this order.
LAYER_WEIGHT_NAMES: Final = {
    "attention_norm": ("model.layers.{layer}.input_layernorm",),
    "qkv": (
        "model.layers.{layer}.self_attn.q_proj",
        "model.layers.{layer}.self_attn.k_proj",
        "model.layers.{layer}.self_attn.v_proj",
    ),
    "output": ("model.layers.{layer}.self_attn.o_proj",),
    "q_norm": ("model.layers.{layer}.self_attn.q_norm",),
    "k_norm": ("model.layers.{layer}.self_attn.k_norm",),
    "mlp_norm": ("model.layers.{layer}.post_attention_layernorm",),
    "gate_up": ("model.layers.{layer}.mlp.gate_proj", "model.layers.{layer}.mlp.up_proj"),
    "down": ("model.layers.{layer}.mlp.down_proj",),
    "router": ("model.layers.{layer}.mlp.gate",),
    "shared_gate_up": (
        "model.layers.{layer}.mlp.shared_expert.gate_proj",
        "model.layers.{layer}.mlp.shared_expert.up_proj",
    ),
    "shared_down": ("model.layers.{layer}.mlp.shared_expert.down_proj",),
    "shared_router": ("model.layers.{layer}.mlp.shared_expert_gate",),
}
# Gate, up and down of an expert.
EXPERT_WEIGHT_NAMES: Final = (
    "model.layers.{layer}.mlp.experts.{expert}.gate_proj",
    "model.layers.{layer}.mlp.experts.{expert}.up_proj",
    "model.layers.{layer}.mlp.experts.{expert}.down_proj",
)
WEIGHT_NAMES: Final = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


class QwenMoeLayer:
    def __init__(self, config: ModelConfig, layer: int, weights: Weights) -> None:
        names = {ours: [name.format(layer=layer) for name in theirs] for ours, theirs in LAYER_WEIGHT_NAMES.items()}
        hidden, eps = config.hidden_size, config.rms_norm_eps
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.attention_norm = weights.norm(names["attention_norm"][0], hidden, eps)
        self.attention = Attention(
            weights.linear(names["qkv"], [q_size, kv_size, kv_size], hidden, bias=config.attention_bias),
            weights.linear(names["output"], [hidden], q_size, bias=config.output_bias),
            (config.num_heads, config.head_dim),
            config.sliding_windows[layer],
            weights.norm(names["q_norm"][0], config.head_dim, eps) if config.qk_norm else None,
            weights.norm(names["k_norm"][0], config.head_dim, eps) if config.qk_norm else None,
        )
        self.mlp_norm = weights.norm(names["mlp_norm"][0], hidden, eps)
        self.mlp = _feed_forward(config, layer, names, weights)

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
        norm = self.attention_norm
        normed_TD = norm(residual_TD, ops) if x_TD is None else norm.add(x_TD, residual_TD, ops)
        attended_TD = self.attention(normed_TD, rotary, kv_cache, metadata, ops)
        normed_TD = self.mlp_norm.add(attended_TD, residual_TD, ops)
        return self.mlp(normed_TD, ops)


def _feed_forward(
    config: ModelConfig, layer: int, names: dict[str, list[str]], weights: Weights
) -> GatedMLP | ExpertsMLP:
    experts, hidden = config.experts, config.hidden_size
    assert experts is not None
    if layer in experts.dense_layers:
        return _gated(names["gate_up"], names["down"], hidden, config.intermediate_size, weights)
    expert_names = [name.replace("{layer}", str(layer)) for name in EXPERT_WEIGHT_NAMES]
    router = weights.linear(names["router"], [experts.count], hidden)
    loaded = weights.experts(expert_names, experts.count, experts.intermediate_size, hidden)
    shared = None
    if experts.shared_intermediate_size:
        inner = experts.shared_intermediate_size
        block = _gated(names["shared_gate_up"], names["shared_down"], hidden, inner, weights)
        shared = SharedExpert(block, weights.linear(names["shared_router"], [1], hidden))
    return ExpertsMLP(router, loaded, experts.per_token, is_renormalized=experts.is_renormalized, shared=shared)


def _gated(gate_up: list[str], down: list[str], hidden: int, inner: int, weights: Weights) -> GatedMLP:
    return GatedMLP(weights.linear(gate_up, [inner, inner], hidden), weights.linear(down, [hidden], inner))


class QwenMoeForCausalLM:
    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None:
        self.embedding = weights.embedding(WEIGHT_NAMES["embedding"], config.vocab_size, config.hidden_size)
        self.head = output_head(config, weights, WEIGHT_NAMES["head"], self.embedding)
        self.layers = DecoderLayers(QwenMoeLayer(config, layer, weights) for layer in range(config.num_layers))
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
        return self.head(self.hidden(x_RD, residual_RD, ops), ops, torch.float32)
