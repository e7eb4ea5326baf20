"""llguidance (https://github.com/guidance-ai/llguidance) behind our interface; grammar_text.py writes its language.

Its limits are counts, not seconds, so what is refused does not depend on how busy the machine is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import llguidance
import numpy as np
from numpy.typing import NDArray

from penstock.messages import GrammarSpec, Vocabulary
from penstock.structured.backend import GrammarError
from penstock.structured.grammar_text import grammar_text, special_tokens_by_text
from penstock.structured.spelling import Spelling

# A mask that is within these takes up to about 5 ms (14,000 units of lexer fuel and 20,000 items a millisecond);
# an ordinary one takes 10 microseconds.
LIMITS: Final = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=60_000,
    step_max_items=20_000,
    max_items_in_row=2_000,
    max_lexer_states=50_000,
    max_grammar_size=300_000,
    verbose_errors=False,
)
# Ordinary masks take microseconds: more threads would cost more than they save.
NUM_BATCH_THREADS: Final = 1
MAX_MESSAGE_CHARS: Final = 300
_PLACE: Final = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")


class LlguidanceBackend:
    """The vocabulary of one model as llguidance wants it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Takes 50 ms for 32,000 tokens. Raises GrammarError when sequences of this model have no end."""
        if not vocabulary.eos_token_ids:
            raise GrammarError("This model has no end-of-sequence token, so that no output could end by a grammar.")
        self._special_token_ids = special_tokens_by_text(vocabulary)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(vocabulary)), eos_token=vocabulary.eos_token_ids
        )

    def text(self, spec: GrammarSpec) -> str:
        return grammar_text(spec, self._special_token_ids)

    def check(self, text: str) -> None:
        is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(text, self._tokenizer, limits=LIMITS)
        if is_error or messages:
            raise GrammarError(_first_line(messages[0] if messages else "it is not valid"))

    def compile(self, text: str) -> LlguidanceMatcher:
        matcher = LlguidanceMatcher(llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=LIMITS))
        if error := matcher.error():
            raise GrammarError(error)
        return matcher


class LlguidanceMatcher:
    """See backend.Matcher."""

    __slots__ = ("consume", "forced_tokens", "inner")

    def __init__(self, matcher: Any) -> None:
        """matcher: an LLMatcher."""
        self.inner = matcher
        # Called for every token of every row: without a frame of Python's between.
        self.consume: Callable[[int], bool] = matcher.consume_token
        self.forced_tokens: Callable[[], list[int]] = matcher.compute_ff_tokens

    def consume_all(self, token_ids: list[int]) -> bool:
        return bool(self.inner.consume_tokens(token_ids))

    def fill_mask(self, address: int, size_bytes: int) -> None:
        self.inner.unsafe_compute_mask_ptr(address, size_bytes)

    def accepts_all(self, token_ids: list[int]) -> bool:
        return bool(self.inner.validate_tokens(token_ids) == len(token_ids))

    def rollback(self, num_tokens: int) -> None:
        self.inner.rollback(num_tokens)

    def copy(self) -> LlguidanceMatcher:
        return LlguidanceMatcher(self.inner.deep_copy())

    def is_complete(self) -> bool:
        return bool(self.inner.is_accepting())

    def error(self) -> str:
        return _first_line(self.inner.get_error()) if self.inner.is_error() else ""


class LlguidanceBatch:
    """See backend.MatcherBatch. The call holds the interpreter's lock only to read its arguments."""

    def __init__(self) -> None:
        self._executor = llguidance.LLExecutor(NUM_BATCH_THREADS)

    def fill_masks(self, matchers: Sequence[Any], slots: Sequence[int], masks: NDArray[np.int32]) -> None:
        pairs = [(matcher.inner, slot) for matcher, slot in zip(matchers, slots, strict=True)]
        self._executor.unsafe_compute_mask_ptr(pairs, masks.ctypes.data, masks.strides[0], len(masks))


class _Tokens:
    """What llguidance's TokenizerWrapper asks of a tokenizer. Called with bytes: the text of forced tokens."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.token_bytes
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.special_token_ids = sorted({*vocabulary.special_token_ids, *vocabulary.eos_token_ids})
        self._spelling = Spelling(vocabulary)

    def __call__(self, text: bytes) -> list[int]:
        return self._spelling(text)


def _first_line(message: str) -> str:
    """What a library says, without the places in text that is ours, the state it appends, and its advice."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    line = _PLACE.sub("", lines[0]) if lines else ""
    if line.startswith("NoExtension"):
        return "no text satisfies it"
    if line.endswith("regex parse error:"):
        details = (one.removeprefix("error: ") for one in lines if one.startswith("error: "))
        line = f"{line} {next(details, '')}"
    line = line.partition(". Enable 'coerce_one_of'")[0].removesuffix("<non-verbose/>").strip()
    return line[:MAX_MESSAGE_CHARS] or "it is not valid"
