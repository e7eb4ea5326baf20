"""Token ids to text, a few tokens at a time.

The concatenation of what `add` and `finish` return equals decoding all tokens at once, and no text is given out that
a later token could still change: an incomplete character is held back until it is complete or can no longer become so.
Time is proportional to the tokens added; what a token contributes is looked up in a table that fills as tokens occur.
Owns: the bytes held back of the streams in progress.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol

from penstock.frontend.token_pipeline import METASPACE, DecoderKind

REPLACEMENT: Final = "\ufffd"

# What a token contributes: text, or one byte (0 to 255) of a character, or None: nothing at all.
Piece = str | int | None


class Detokenizer(Protocol):
    """Turns one stream of tokens into text."""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now that these tokens follow."""
        ...

    def finish(self) -> str:
        """The text still held back, now that no token follows. Call once."""
        ...


class ByteTable(dict[int, bytes]):
    """The bytes of each token of a byte-level tokenizer, filled on demand. Skipped and unknown ids have none."""

    def __init__(self, token_of: Callable[[int], str | None], skipped: Collection[int]) -> None:
        super().__init__()
        self._token_of = token_of
        self._skipped = skipped

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._token_of(token_id)
        data = b"" if token is None else byte_level_bytes(token)
        self[token_id] = data
        return data


class PieceTable(dict[int, Piece]):
    """What each token of a tokenizer with text tokens contributes, filled on demand."""

    def __init__(self, token_of: Callable[[int], str | None], skipped: Collection[int], kind: DecoderKind) -> None:
        super().__init__()
        self._token_of = token_of
        self._skipped = skipped
        self._kind = kind

    def __missing__(self, token_id: int) -> Piece:
        token = None if token_id in self._skipped else self._token_of(token_id)
        piece = None if token is None else self.piece_of(token)
        self[token_id] = piece
        return piece

    def piece_of(self, token: str) -> Piece:
        continuation = self._kind.continuation
        if continuation is not None:
            token = token.removeprefix(continuation) if token.startswith(continuation) else f" {token}"
        for old, new in self._kind.replacements:
            token = token.replace(old, new)
        if self._kind.name == "byte_fallback":
            return _fallback_byte(token)
        return token

    def bare(self, token_id: int) -> str:
        """The token's text with metaspaces removed instead of replaced."""
        return (self._token_of(token_id) or "").replace(METASPACE, "")


class ByteLevelDetokenizer:
    """For tokens that are bytes: decodes UTF-8 as it comes, holding back at most three bytes."""

    __slots__ = ("_held", "_table")

    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._held = b""

    def add(self, token_ids: Sequence[int]) -> str:
        table = self._table
        data = table[token_ids[0]] if len(token_ids) == 1 else b"".join([table[token_id] for token_id in token_ids])
        if self._held:
            data = self._held + data
        text, used = utf_8_decode(data, "replace", False)
        self._held = b"" if used == len(data) else data[used:]
        return text

    def finish(self) -> str:
        text, _ = utf_8_decode(self._held, "replace", True)
        self._held = b""
        return text


class PieceDetokenizer:
    """For tokens that are text or single bytes. A run of bytes is held back whole until something else follows:
    whether its first characters stand depends on its last bytes."""

    __slots__ = ("_first_token_bare", "_run", "_strip_space", "_table")

    def __init__(self, table: PieceTable, kind: DecoderKind) -> None:
        self._table = table
        self._strip_space = kind.strip_first_space
        self._first_token_bare = kind.first_token_bare
        self._run = bytearray()

    def add(self, token_ids: Sequence[int]) -> str:
        texts: list[str] = []
        for token_id in token_ids:
            piece = self._table[token_id]
            if piece is None:
                continue
            if isinstance(piece, int):
                self._run.append(piece)
                continue
            if self._run:
                texts.append(self._end_run())
            if self._first_token_bare:
                piece = self._table.bare(token_id)
                self._first_token_bare = False
            texts.append(piece)
        return self._give("".join(texts))

    def finish(self) -> str:
        return self._give(self._end_run())

    def _end_run(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = REPLACEMENT * len(self._run)
        self._run.clear()
        return text

    def _give(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


def _printable_bytes() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable Latin-1 stands for itself, every other byte for U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + index): byte for index, byte in enumerate(rest)}


BYTE_OF_CHARACTER: Final = _printable_bytes()


def byte_level_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for. One with a character outside the alphabet stands for its own text."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


def _fallback_byte(token: str) -> str | int:
    """The byte of a token written like <0x0A>, else the token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return token
    return token
