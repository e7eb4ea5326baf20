"""Tool calls in Hermes style, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, out of text in pieces.

What comes out does not depend on how the text was cut: a streamed and a whole answer go through the same parser.
Malformed calls stay text, so nothing the model wrote is lost. Linear time; no regular expression.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """arguments: the JSON object exactly as the model wrote it."""

    name: str
    arguments: str


class _Call(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


_decoder = msgspec.json.Decoder(_Call)
_object_decoder = msgspec.json.Decoder(dict[str, object])


class HermesParser:
    """Splits text into content and calls. White space around calls is not content.

    Two states: outside a call, text goes out but for a tail that may still become a tag, or white space that may
    stand before one; inside, everything is held until the closing tag or the end.
    """

    def __init__(self) -> None:
        self._is_inside = False
        self._held: list[str] = []  # the call's text so far
        self._pending = ""  # outside: the tail that is not decided; inside: the tail that may become CLOSE
        self._is_after_call = False
        self.num_calls = 0

    def feed(self, text: str) -> list[str | ParsedCall]:
        """The content and calls that are certain now."""
        found: list[str | ParsedCall] = []
        rest = self._pending + text
        self._pending = ""
        while rest:
            rest = self._feed_inside(rest, found) if self._is_inside else self._feed_outside(rest, found)
        return found

    def finish(self) -> list[str | ParsedCall]:
        """What the end of the text decides. A complete call without its closing tag counts: models stop there."""
        found: list[str | ParsedCall] = []
        if self._is_inside:
            text = "".join(self._held) + self._pending
            self._add_call(text, OPEN + text, found)
        elif self._pending and not (self._is_after_call and self._pending.isspace()):
            self._add_content(self._pending, found)
        self._pending = ""
        return found

    def _feed_outside(self, text: str, found: list[str | ParsedCall]) -> str:
        start = text.find(OPEN)
        if start < 0:
            kept = _undecided_tail(text, OPEN)
            cut = len(text[: len(text) - kept].rstrip())
            self._add_content(text[:cut], found)
            self._pending = text[cut:]
            return ""
        self._add_content(text[:start].rstrip(), found)
        self._is_inside, self._held = True, []
        return text[start + len(OPEN) :]

    def _feed_inside(self, text: str, found: list[str | ParsedCall]) -> str:
        end = text.find(CLOSE)
        if end < 0:
            cut = len(text) - _undecided_tail(text, CLOSE)
            self._held.append(text[:cut])
            self._pending = text[cut:]
            return ""
        self._held.append(text[:end])
        inner = "".join(self._held)
        self._is_inside = False
        self._add_call(inner, OPEN + inner + CLOSE, found)
        return text[end + len(CLOSE) :]

    def _add_content(self, text: str, found: list[str | ParsedCall]) -> None:
        if self._is_after_call:
            text = text.lstrip()
        if text:
            self._is_after_call = False
            found.append(text)

    def _add_call(self, inner: str, whole: str, found: list[str | ParsedCall]) -> None:
        call = _parse_call(inner)
        if call is None:
            self._is_after_call = False
            found.append(whole)
        else:
            self._is_after_call = True
            self.num_calls += 1
            found.append(call)


def _parse_call(text: str) -> ParsedCall | None:
    try:
        call = _decoder.decode(text.encode())
        _object_decoder.decode(call.arguments)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None
    return ParsedCall(call.name, bytes(call.arguments).decode()) if call.name else None


def _undecided_tail(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
