"""The Python API: LLM, the engine in this process, and AsyncLLM, the engine in a process of its own.

Owns: nothing.
Never: adds behaviour that the server lacks.
"""

from penstock.frontend.beam_search import BeamSearchParams
from penstock.llm.async_llm import AsyncLLM
from penstock.llm.llm import LLM
from penstock.llm.results import Classification, Completion, Embedding, Generation, Ranked

__all__ = ["LLM", "AsyncLLM", "BeamSearchParams", "Classification", "Completion", "Embedding", "Generation", "Ranked"]
