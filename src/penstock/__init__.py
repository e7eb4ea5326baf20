"""Penstock: an LLM serving framework. `from penstock import LLM, SamplingParams` for offline use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.llm import LLM, AsyncLLM
    from penstock.messages import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads the public classes on first use: importing penstock must stay cheap."""
    if name in ("LLM", "AsyncLLM"):
        from penstock import llm

        return getattr(llm, name)
    if name == "SamplingParams":
        from penstock.messages import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
