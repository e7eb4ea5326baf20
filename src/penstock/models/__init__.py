"""One flat file a family.

Owns: its weights.
Never: knows about requests.
"""

from penstock.models.registry import ARCHITECTURES, LanguageModel, base_prefix, is_ignored_tensor

__all__ = ["ARCHITECTURES", "LanguageModel", "base_prefix", "is_ignored_tensor"]
