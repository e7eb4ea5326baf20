"""Mistral: Llama with a sliding window over every layer, and no biases."""

from __future__ import annotations

from typing import Final

from penstock.config.model import ModelConfig
from penstock.layers import Attention, DecoderLayer, GatedMLP, Weights

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
    "gate_up": ("model.layers.{layer}.mlp.gate_proj", "model.layers.{layer}.mlp.up_proj"),
    "down": ("model.layers.{layer}.mlp.down_proj",),
}


def mistral_layer(config: ModelConfig, layer: int, weights: Weights) -> DecoderLayer:
    names = {ours: [name.format(layer=layer) for name in theirs] for ours, theirs in LAYER_WEIGHT_NAMES.items()}
    hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention_norm = weights.norm(names["attention_norm"][0], hidden, eps)
    attention = Attention(
        weights.linear(names["qkv"], [q_size, kv_size, kv_size], hidden),
        weights.linear(names["output"], [hidden], q_size),
        (config.num_heads, config.head_dim),
        config.sliding_windows[layer],
    )
    mlp_norm = weights.norm(names["mlp_norm"][0], hidden, eps)
    mlp = GatedMLP(
        weights.linear(names["gate_up"], [inner, inner], hidden),
        weights.linear(names["down"], [hidden], inner),
    )
    return DecoderLayer(attention_norm, attention, mlp_norm, mlp)
