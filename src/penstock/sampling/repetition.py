"""DRY: tokens that would go on with a sequence that stood here before are penalised, the longer the more.

After https://github.com/oobabooga/text-generation-webui/pull/5677.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

# Repetitions are followed back so far; what is longer gets the same penalty.
MAX_MATCH = 64


def penalise_repetition(
    logits_V: NDArray[np.float32],
    token_ids: NDArray[np.int64],
    *,
    multiplier: float,
    base: float,
    allowed_length: int,
    breakers: Collection[int],
) -> None:
    """Lowers in place the logit of every token that would make a repeated sequence longer than allowed_length.

    token_ids: prompt and output so far. A token that followed an earlier copy of the last n tokens is lowered by
    multiplier * base ** (n - allowed_length), for the longest such n of at least allowed_length. Sequences do not
    reach over a breaker.
    """
    count = len(token_ids)
    longest = _run_without_breaker(token_ids, breakers)
    if longest < max(allowed_length, 1):
        return
    ends = np.flatnonzero(token_ids[: count - 1] == token_ids[-1])  # earlier places of the last token
    lengths = np.ones(len(ends), dtype=np.int64)
    going = np.arange(len(ends))
    for length in range(1, longest):
        before = ends[going] - length
        going = going[(before >= 0) & (token_ids[before] == token_ids[count - 1 - length])]
        if not len(going):
            break
        lengths[going] = length + 1
    counts = lengths >= max(allowed_length, 1)
    followers, matched = token_ids[ends[counts] + 1], lengths[counts]
    best = np.zeros(int(followers.max()) + 1 if len(followers) else 0, dtype=np.int64)
    np.maximum.at(best, followers, matched)
    for token_id in np.unique(followers):
        if int(token_id) not in breakers:
            logits_V[token_id] -= np.float32(multiplier * base ** float(best[token_id] - allowed_length))


def _run_without_breaker(token_ids: NDArray[np.int64], breakers: Collection[int]) -> int:
    """How many of the last tokens, at most MAX_MATCH, come after the last breaker."""
    for length, token_id in enumerate(token_ids[: -MAX_MATCH - 1 : -1].tolist()):
        if token_id in breakers:
            return length
    return min(len(token_ids), MAX_MATCH)
