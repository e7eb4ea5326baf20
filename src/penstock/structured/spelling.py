"""How the model's own tokenizer spells a text that a grammar forces: as it does in what the model was trained on."""

from __future__ import annotations

from functools import cached_property
from typing import Final

from tokenizers import Tokenizer

from penstock.messages import Vocabulary

# Put before a text: tokenizers that begin every text with a space do it before this instead.
_ANCHOR: Final = "\n"
_MAX_KEPT: Final = 4096
_MAX_KEPT_BYTES: Final = 256
_ANCHOR_BYTES: Final = (b"\n", b" \n")


class Spelling:
    """Text to tokens. Where the tokenizer does not give a text back exactly, or is not known, the longest tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Takes as long as it takes to read a tokenizer.json: 0.3 s for 128,000 tokens."""
        self._token_bytes = vocabulary.token_bytes
        self._control_ids = frozenset((*vocabulary.special_token_ids, *vocabulary.eos_token_ids))
        self._kept: dict[bytes, list[int]] = {}
        self._tokenizer = Tokenizer.from_str(vocabulary.tokenizer) if vocabulary.tokenizer else None

    def __call__(self, text: bytes) -> list[int]:
        """Tokens whose bytes are exactly `text`, none of them a control token; none where there are no such tokens."""
        # The same keys are forced in every row and every answer, each time at the price of many tokens' masks.
        if len(text) > _MAX_KEPT_BYTES:
            return self._spell(text)
        found = self._kept.get(text)
        if found is None:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            found = self._kept[text] = self._spell(text)
        return found

    def _spell(self, text: bytes) -> list[int]:
        return self._by_tokenizer(text) or self._by_length(text)

    def _by_tokenizer(self, text: bytes) -> list[int]:
        if self._tokenizer is None:
            return []
        try:
            decoded = text.decode()
        except UnicodeDecodeError:
            return []
        ids: list[int] = self._tokenizer.encode(decoded, add_special_tokens=False).ids
        if self._is_spelling(ids, text):
            return ids
        ids = self._tokenizer.encode(_ANCHOR + decoded, add_special_tokens=False).ids
        written = b""
        for index, token_id in enumerate(ids):
            written += self._bytes_of(token_id)
            if written in _ANCHOR_BYTES and self._is_spelling(ids[index + 1 :], text):
                return ids[index + 1 :]
        return []

    def _is_spelling(self, ids: list[int], text: bytes) -> bool:
        return b"".join(map(self._bytes_of, ids)) == text and self._control_ids.isdisjoint(ids)

    def _bytes_of(self, token_id: int) -> bytes:
        return self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""

    def _by_length(self, text: bytes) -> list[int]:
        ids: list[int] = []
        position = 0
        while position < len(text):
            ends = range(min(len(text), position + self._longest), position, -1)
            end = next((end for end in ends if text[position:end] in self._id_of), None)
            if end is None:
                return []
            ids.append(self._id_of[text[position:end]])
            position = end
        return ids

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for token_id, token in enumerate(self._token_bytes):
            if token and token_id not in self._control_ids:
                found.setdefault(token, token_id)
        return found

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._id_of), default=0)
