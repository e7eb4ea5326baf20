"""Outputs that obey a grammar: what may be asked for, how it is compiled safely, and which tokens may come next.

Owns: compiled grammars, the state of every constrained row, the processes in which grammars are tried out.
Never: imports torch; decides who runs; compiles on the engine's own thread.
"""

from penstock.structured.backend import GrammarError
from penstock.structured.compiler import CompiledGrammar, GrammarCompiler
from penstock.structured.token_masks import TokenMasks

__all__ = ["CompiledGrammar", "GrammarCompiler", "GrammarError", "TokenMasks"]
