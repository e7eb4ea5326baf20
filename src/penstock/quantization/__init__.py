"""How a weight format is stored, repacked and multiplied; one file a format.

Owns: nothing.
Never: knows about models.
"""

from penstock.quantization.linear_format import EmbeddingWeight, LinearFormat, LinearWeight
from penstock.quantization.tensor_source import CheckpointSource, DummySource, TensorSource
from penstock.quantization.unquantized import UnquantizedFormat

__all__ = [
    "CheckpointSource",
    "DummySource",
    "EmbeddingWeight",
    "LinearFormat",
    "LinearWeight",
    "TensorSource",
    "UnquantizedFormat",
]
