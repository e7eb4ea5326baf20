"""Mixtral: Mistral whose feed-forward blocks are mixtures of experts."""

from __future__ import annotations

from typing import Final

from penstock.config.model import ModelConfig
from penstock.layers import Attention, DecoderLayer, ExpertsMLP, Weights

# Ours to the checkpoint's: several names are fused into one linear, in this order.
LAYER_WEIGHT_NAMES: Final = {
    "attention_norm": ("model.layers.{layer}.input_layernorm",),
    "qkv": (
        "model.layers.{layer}.self_attn.q_proj",
        "model.layers.{layer}.self_attn.k_proj",
        "model.layers.{layer}.self_attn.v_proj",
    ),
    "output": ("model.layers.{layer}.self_attn.o_proj",),
    "mlp_norm": ("model.layers.{layer}.post_attention_layernorm",),
    "router": ("model.layers.{layer}.block_sparse_moe.gate",),
}
# Gate, up and down of an expert.
EXPERT_WEIGHT_NAMES: Final = (
    "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1",
    "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3",
    "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",
)


def mixtral_layer(config: ModelConfig, layer: int, weights: Weights) -> DecoderLayer:
    names = {ours: [name.format(layer=layer) for name in theirs] for ours, theirs in LAYER_WEIGHT_NAMES.items()}
    assert config.experts is not None
    hidden, eps = config.hidden_size, config.rms_norm_eps
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention_norm = weights.norm(names["attention_norm"][0], hidden, eps)
    attention = Attention(
        weights.linear(names["qkv"], [q_size, kv_size, kv_size], hidden),
        weights.linear(names["output"], [hidden], q_size),
        (config.num_heads, config.head_dim),
        config.sliding_windows[layer],
    )
    mlp_norm = weights.norm(names["mlp_norm"][0], hidden, eps)
    expert_names = [name.replace("{layer}", str(layer)) for name in EXPERT_WEIGHT_NAMES]
    mlp = ExpertsMLP(
        weights.linear(names["router"], [config.experts.count], hidden),
        weights.experts(expert_names, config.experts.count, config.experts.intermediate_size, hidden),
        config.experts.per_token,
        is_renormalized=config.experts.is_renormalized,
    )
    return DecoderLayer(attention_norm, attention, mlp_norm, mlp)
