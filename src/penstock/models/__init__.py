"""One flat file a family.

Owns: its weights.
Never: knows about requests.
"""

from penstock.models.registry import ARCHITECTURES, CausalLM, is_ignored_tensor

__all__ = ["ARCHITECTURES", "CausalLM", "is_ignored_tensor"]
