"""The offline LLM class: the same engine, in process.

Owns: nothing.
Never: adds behaviour that the server lacks.
"""

from penstock.llm.llm import LLM
from penstock.llm.results import Completion, Generation

__all__ = ["LLM", "Completion", "Generation"]
