"""Everything that changes a row's logits before a token is drawn, in a fixed order.

Order: logit_bias, min_tokens, bad_words, penalties. All but the penalties' arithmetic commute, and a masked token
stays masked. Rows without any of these have no LogitEdits and cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.messages import SamplingParams
from penstock.sampling.penalties import TokenCounts


class TokenPenalties(NamedTuple):
    """The distinct tokens of a request, how often each stands in its output, and what that costs."""

    ids: NDArray[np.int64]
    counts: NDArray[np.float32]
    repetition: float
    presence: float
    frequency: float


class LogitEdits:
    """The edits of one request. `token_ids`: all its tokens so far, the first `num_prompt_tokens` are its prompt."""

    @classmethod
    def of(
        cls,
        sampling: SamplingParams,
        stop_token_ids: tuple[int, ...],
        token_ids: NDArray[np.int64],
        num_prompt_tokens: int,
        vocab_size: int,
    ) -> LogitEdits | None:
        """None when the request's parameters change no logit. ValueError: a token id outside the vocabulary."""
        penalised = (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        masks_stops = sampling.min_tokens > 0 and len(stop_token_ids) > 0
        if not (penalised or masks_stops or sampling.logit_bias or sampling.bad_words_token_ids):
            return None
        return cls(
            sampling, stop_token_ids, TokenCounts(token_ids, num_prompt_tokens) if penalised else None, vocab_size
        )

    def __init__(
        self,
        sampling: SamplingParams,
        stop_token_ids: tuple[int, ...],
        counts: TokenCounts | None,
        vocab_size: int,
    ) -> None:
        self._sampling = sampling
        self._counts = counts
        self._bias_ids = _checked_ids(sampling.logit_bias, vocab_size)
        self._bias_values = np.fromiter(sampling.logit_bias.values(), dtype=np.float32)
        self._stop_ids = _checked_ids(stop_token_ids, vocab_size)
        self._banned_ids = _checked_ids(
            (words[0] for words in sampling.bad_words_token_ids if len(words) == 1), vocab_size
        )
        self._banned_sequences = [list(words) for words in sampling.bad_words_token_ids if len(words) > 1]
        for words in self._banned_sequences:
            _checked_ids(words, vocab_size)

    def apply(self, logits_V: NDArray[np.float32], output_ids: NDArray[np.int64]) -> None:
        """Edits the row in place. output_ids: the output so far."""
        if len(self._bias_ids):
            logits_V[self._bias_ids] += self._bias_values
        logits_V[self.excluded(output_ids)] = -np.inf
        if self._counts is not None:
            sampling = self._sampling
            self._counts.apply(
                logits_V, sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
            )

    @property
    def bias(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Tokens and what is added to their logits."""
        return self._bias_ids, self._bias_values

    def excluded(self, output_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens that may not come after this output."""
        completed = [words[-1] for words in self._banned_sequences if _ends_with(output_ids, words[:-1])]
        stops = self._stop_ids if len(output_ids) < self._sampling.min_tokens else self._stop_ids[:0]
        return np.concatenate([stops, self._banned_ids, np.array(completed, dtype=np.int64)])

    @property
    def penalties(self) -> TokenPenalties | None:
        if self._counts is None:
            return None
        sampling = self._sampling
        return TokenPenalties(
            *self._counts.entries, sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        )

    def add(self, token_id: int) -> None:
        """The request's output grew by this token."""
        if self._counts is not None:
            self._counts.add(token_id)


def _ends_with(output_ids: NDArray[np.int64], prefix: list[int]) -> bool:
    return len(prefix) <= len(output_ids) and output_ids[len(output_ids) - len(prefix) :].tolist() == prefix


def _checked_ids(ids: Iterable[int], vocab_size: int) -> NDArray[np.int64]:
    array = np.fromiter(ids, dtype=np.int64)
    if len(array) and not (array.min() >= 0 and array.max() < vocab_size):
        raise ValueError("a token id is outside the vocabulary")
    return array
