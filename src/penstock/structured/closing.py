"""A short way to the end of an output, so that it can be closed before its tokens run out.

The shortest way would take a search through the grammar; what is here is a walk that takes the most closing token at
every state. It is sound (what it returns completes the output), not complete: a grammar it does not get through is
cut off at max_tokens, with finish_reason "length".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from penstock.messages import Vocabulary
from penstock.structured.backend import Matcher

MAX_CLOSING_TOKENS: Final = 512
_CLOSERS: Final = frozenset(b"}])>")
_FIRST_LOOK: Final = 256
_MAX_USES: Final = 4


class ClosingTokens:
    """The tokens of a vocabulary in the order in which they lead to an end: one order within free text, one outside.

    Free text is where a letter that no keyword begins with may come next: a brace there is text, a quote ends it.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokens = vocabulary.token_bytes
        excluded = {*vocabulary.special_token_ids, *vocabulary.eos_token_ids}
        ids = [token_id for token_id, token in enumerate(tokens) if token and token_id not in excluded]
        # A control token that may come in the middle of text ends that text: reasoning, say.
        self._control = np.array(sorted(excluded - set(vocabulary.eos_token_ids)), dtype=np.int64)
        self._in_text = np.array(sorted(ids, key=lambda token_id: _rank_in_text(tokens[token_id])), dtype=np.int64)
        self._outside = np.array(sorted(ids, key=lambda token_id: _rank_outside(tokens[token_id])), dtype=np.int64)
        self._kinds = np.array([_kind(token) for token in tokens], dtype=np.int8)
        self.eos_token_ids = vocabulary.eos_token_ids
        self._closes = frozenset(token_id for token_id in ids if _CLOSERS.issuperset(tokens[token_id].strip(b'"')))
        self._letter = next((token_id for token_id in ids if tokens[token_id] == b"z"), None)

    def closes(self, token_id: int) -> bool:
        return token_id in self._closes

    def best(self, mask: NDArray[np.int32], previous: int | None, worn: Sequence[int]) -> int | None:
        """The allowed token that closes most; None when none is. After letters or digits more of the same are taken
        only where nothing else may come, so that runs end, and worn ones only where they alone may."""
        is_in_text = self._letter is not None and bool(mask[self._letter >> 5] >> (self._letter & 31) & 1)
        order = self._in_text if is_in_text else self._outside
        avoided = int(self._kinds[previous]) if previous is not None else 0
        fallbacks: list[int] = []
        worn_ones: list[int] = []
        for candidates in (self._control, order[:_FIRST_LOOK], order[_FIRST_LOOK:]):
            allowed = candidates[((mask[candidates >> 5] >> (candidates & 31).astype(np.int32)) & 1).astype(bool)]
            if worn:
                is_worn = np.isin(allowed, worn)
                worn_ones += allowed[is_worn][:1].tolist()
                allowed = allowed[~is_worn]
            for token_id in (allowed[self._kinds[allowed] != avoided] if avoided else allowed)[:1]:
                return int(token_id)
            fallbacks += allowed[:1].tolist()
        return next(iter(fallbacks + worn_ones), None)


def closing_path(matcher: Matcher, tokens: ClosingTokens, mask: NDArray[np.int32], max_tokens: int) -> list[int] | None:
    """Tokens, at most max_tokens, after which the output is complete. `mask` is overwritten; the matcher stays."""
    limit = min(max_tokens, MAX_CLOSING_TOKENS)
    # A run that never closes ("a"+ before "b") ends once its tokens are worn; elsewhere, wear only makes detours.
    for max_uses in (limit, _MAX_USES):
        path, found = _walk(matcher, tokens, mask, limit, max_uses)
        if path:
            matcher.rollback(len(path))
        if found or matcher.error():
            return path if found else None
    return None


def _walk(
    matcher: Matcher, tokens: ClosingTokens, mask: NDArray[np.int32], limit: int, max_uses: int
) -> tuple[list[int], bool]:
    """The path that the matcher has gone, and whether it is complete there. max_uses: a token that closes nothing and
    was taken so often is worn."""
    path: list[int] = []
    uses = Counter[int]()
    worn: list[int] = []
    while not (found := matcher.is_complete()) and len(path) < limit and not matcher.error():
        matcher.fill_mask(mask.ctypes.data, mask.nbytes)
        token_id = tokens.best(mask, path[-1] if path else None, worn)
        if token_id is None or not matcher.consume(token_id):
            break
        path.append(token_id)
        uses[token_id] += 1
        if uses[token_id] == max_uses and not tokens.closes(token_id):
            worn.append(token_id)
    return path, found


def _kind(token: bytes) -> int:
    """1: digits, 2: letters (with digits), 0: anything else."""
    return (1 if token.isdigit() else 2) if token.isalnum() else 0


def _rank_in_text(token: bytes) -> tuple[int, int, bytes]:
    """A quote with closers behind it, the longer the better; then what fills a least length quickest."""
    if token[:1] == b'"' and all(byte in _CLOSERS for byte in token[1:]):
        return 0, -len(token), token
    if token.isalnum() and token.isascii():
        return 1, -len(token), token
    return (3 if token.isspace() else 2), len(token), token


def _rank_outside(token: bytes) -> tuple[int, int, bytes]:
    """Closers, then a short value, then what goes on, then what opens, then white space."""
    first = token[:1]
    if all(byte in _CLOSERS for byte in token):
        return 0, -len(token), token
    if token.isdigit():
        return 1, len(token), token
    if first == b'"':
        return 2, -sum(byte in b'"}])>' for byte in token), token
    if token.isspace():
        return 6, len(token), token
    if first in (b"{", b"[", b"(", b"<"):
        return 5, len(token), token
    if token.isalpha() and token.isascii():
        return 3, -len(token), token
    return 4, len(token), token
