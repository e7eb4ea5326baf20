"""How a weight format is stored, repacked and multiplied; one file a format.

Owns: nothing.
Never: knows about models.
"""

from penstock.quantization.expert_weights import ExpertWeights, SeparateExperts, StackedExperts
from penstock.quantization.gguf import GGUFFormat
from penstock.quantization.hub_formats import hub_format
from penstock.quantization.linear_format import EmbeddingWeight, LinearFormat, LinearWeight, WholeStepWeight
from penstock.quantization.online import OnlineFormat
from penstock.quantization.packed_weight import PackedWeight, packed_parts
from penstock.quantization.rounded import RoundedFormat
from penstock.quantization.stored_format import StoredFormat
from penstock.quantization.tensor_source import CheckpointSource, DummySource, TensorSource
from penstock.quantization.unquantized import UnquantizedFormat

__all__ = [
    "CheckpointSource",
    "DummySource",
    "EmbeddingWeight",
    "ExpertWeights",
    "GGUFFormat",
    "LinearFormat",
    "LinearWeight",
    "OnlineFormat",
    "PackedWeight",
    "RoundedFormat",
    "SeparateExperts",
    "StackedExperts",
    "StoredFormat",
    "TensorSource",
    "UnquantizedFormat",
    "WholeStepWeight",
    "hub_format",
    "packed_parts",
]
