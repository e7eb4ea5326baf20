"""One file a family: its layer, and what its weights are called. What all decoders share is in decoder.py.

Owns: its weights.
Never: knows about requests.
"""

from penstock.models.registry import ARCHITECTURES, LanguageModel, base_prefix, is_ignored_tensor

__all__ = ["ARCHITECTURES", "LanguageModel", "base_prefix", "is_ignored_tensor"]
