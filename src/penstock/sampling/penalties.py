"""Repetition, presence and frequency penalties of one row, as vLLM defines them.

Owns: the counts of a row's tokens.
Never: touches a token that the row does not contain: cost follows the request's length, not the vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """The distinct tokens of a request, and how often each stands in its output.

    The arithmetic on a logit depends on its own count alone, so the result is the same however the row came to be
    (token by token, or rebuilt after a preemption).
    """

    def __init__(self, token_ids: NDArray[np.int64], num_prompt_tokens: int) -> None:
        self._ids, first = np.unique(token_ids, return_index=True)
        self._index = {token_id: index for index, token_id in enumerate(self._ids.tolist())}
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._size = len(first)
        for token_id in token_ids[num_prompt_tokens:].tolist():
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Counts one output token."""
        index = self._index.get(token_id)
        if index is None:
            index = self._append(token_id)
        self._counts[index] += 1.0

    @property
    def entries(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The distinct tokens, and how often each stands in the output. Copies: the counts go on."""
        return self._ids[: self._size].copy(), self._counts[: self._size].copy()

    def apply(self, logits_V: NDArray[np.float32], repetition: float, presence: float, frequency: float) -> None:
        """Penalises in place: repetition over prompt and output, presence and frequency over the output."""
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        values = logits_V[ids]
        if repetition != 1.0:
            factor = np.float32(repetition)
            values = np.where(values > 0, values / factor, values * factor)
        if frequency:
            values -= np.float32(frequency) * counts
        if presence:
            values -= np.float32(presence) * (counts > 0)
        logits_V[ids] = values

    def _append(self, token_id: int) -> int:
        index = self._size
        if index == len(self._ids):
            grown = max(2 * index, 64)
            self._ids = np.resize(self._ids, grown) if index else np.zeros(grown, dtype=np.int64)
            counts = np.zeros(grown, dtype=np.float32)
            counts[:index] = self._counts
            self._counts = counts
        self._ids[index] = token_id
        self._counts[index] = 0.0
        self._index[token_id] = index
        self._size = index + 1
        return index
