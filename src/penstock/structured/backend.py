"""The narrow interface to a library that knows grammars. One implementation a file; nothing else knows the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.base.errors import ValidationError
from penstock.messages import GrammarSpec


class GrammarError(ValidationError):
    """A grammar is malformed, cannot be satisfied, or asks for what cannot be enforced."""

    code = "invalid_grammar"


class Matcher(Protocol):
    """One output in progress. A matcher is used by one thread at a time."""

    def consume(self, token_id: int) -> bool:
        """Goes on by a token; whether the grammar takes it. An end-of-sequence token is taken where it may end."""
        ...

    def consume_all(self, token_ids: list[int]) -> bool:
        """consume() of each."""
        ...

    def fill_mask(self, address: int, size_bytes: int) -> None:
        """Writes which tokens may come next: bit i % 32 of the i // 32-th int32 for token i."""
        ...

    def forced_tokens(self) -> list[int]:
        """The tokens of the text that must come next, up to where a choice begins, as the tokenizer spells it. The
        first of them, if any, is all that the mask allows."""
        ...

    def accepts_all(self, token_ids: list[int]) -> bool:
        """Whether all of these could come next, in this order. Changes nothing."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Forgets the last tokens, none of which ended the output."""
        ...

    def copy(self) -> Matcher: ...

    def is_complete(self) -> bool:
        """Whether the output could end here."""
        ...

    def error(self) -> str:
        """Why no further token can be judged; empty while all is well."""
        ...


class MatcherBatch(Protocol):
    """A call for many matchers at once, which runs beside other threads of the interpreter."""

    def fill_masks(self, matchers: Sequence[Matcher], slots: Sequence[int], masks: NDArray[np.int32]) -> None:
        """Matcher.fill_mask of each, into its slot of `masks` [slots, words]."""
        ...


class GrammarBackend(Protocol):
    """A library with the vocabulary of one model."""

    def text(self, spec: GrammarSpec) -> str:
        """What was asked for, in the library's language. Raises GrammarError, naming what cannot be enforced."""
        ...

    def check(self, text: str) -> None:
        """Raises GrammarError where the library finds a fault, or would leave something out."""
        ...

    def compile(self, text: str) -> Matcher:
        """A matcher at the beginning of an output. Raises GrammarError."""
        ...
