"""Qwen2-MoE and Qwen3-MoE: Qwen2 and Qwen3 with mixtures of experts; Qwen2's have an expert for all tokens besides.

A checkpoint may keep a plain feed-forward block in some layers.
"""

from __future__ import annotations

from typing import Final

from penstock.config.model import ModelConfig
from penstock.layers import Attention, DecoderLayer, ExpertsMLP, GatedMLP, SharedExpert, Weights

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


def qwen_moe_layer(config: ModelConfig, layer: int, weights: Weights) -> DecoderLayer:
    names = {ours: [name.format(layer=layer) for name in theirs] for ours, theirs in LAYER_WEIGHT_NAMES.items()}
    hidden, eps = config.hidden_size, config.rms_norm_eps
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention_norm = weights.norm(names["attention_norm"][0], hidden, eps)
    attention = Attention(
        weights.linear(names["qkv"], [q_size, kv_size, kv_size], hidden, bias=config.attention_bias),
        weights.linear(names["output"], [hidden], q_size, bias=config.output_bias),
        (config.num_heads, config.head_dim),
        config.sliding_windows[layer],
        weights.norm(names["q_norm"][0], config.head_dim, eps) if config.qk_norm else None,
        weights.norm(names["k_norm"][0], config.head_dim, eps) if config.qk_norm else None,
    )
    mlp_norm = weights.norm(names["mlp_norm"][0], hidden, eps)
    mlp = _feed_forward(config, layer, names, weights)
    return DecoderLayer(attention_norm, attention, mlp_norm, mlp)


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
