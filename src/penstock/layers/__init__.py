"""Parts that models are made of: linear, attention, norm, rotary, mixtures of experts.

Owns: its weights.
Never: knows about requests.
"""

from penstock.layers.attention import Attention, AttentionMetadata, KVCache
from penstock.layers.decoder import DecoderLayer, DecoderLayers
from penstock.layers.experts import ExpertsMLP, SharedExpert
from penstock.layers.linear import Embedding, Linear
from penstock.layers.mlp import GatedMLP, GeluMLP
from penstock.layers.norm import LayerNorm, RMSNorm
from penstock.layers.rotary import RotaryTable
from penstock.layers.weights import Weights

__all__ = [
    "Attention",
    "AttentionMetadata",
    "DecoderLayer",
    "DecoderLayers",
    "Embedding",
    "ExpertsMLP",
    "GatedMLP",
    "GeluMLP",
    "KVCache",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "RotaryTable",
    "SharedExpert",
    "Weights",
]
