"""Penstock: an LLM serving framework. `from penstock import LLM, SamplingParams` for offline use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.llm import LLM, AsyncLLM
    from penstock.messages import GrammarSpec, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "GrammarSpec", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads the public classes on first use: importing penstock must stay cheap."""
    if name in ("LLM", "AsyncLLM"):
        from penstock import llm

        return getattr(llm, name)
    if name in ("GrammarSpec", "SamplingParams"):
        from penstock import messages

        return getattr(messages, name)
    raise AttributeError(f"module 'penstock' has no attribute {name!r}")
