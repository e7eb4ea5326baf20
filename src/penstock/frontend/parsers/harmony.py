"""GPT-OSS: OpenAI's harmony. A message is a sequence of channels, each a header and a body between markers.

`analysis` is reasoning, `final` and `commentary` without a recipient are content, and a recipient `functions.NAME`
makes a body the arguments of a call.
"""

from __future__ import annotations

from typing import Final

from penstock.frontend.parsers.call_readers import NamedCallReader
from penstock.frontend.parsers.edges import MarkerFinder
from penstock.frontend.parsers.parts import (
    CallStart,
    ParseWarning,
    Part,
    Reasoning,
    ToolSchemas,
    WarningKind,
    shortened,
    whole_call,
)

_CHANNEL: Final = "<|channel|>"
_MESSAGE: Final = "<|message|>"
_START: Final = "<|start|>"
_CONSTRAIN: Final = "<|constrain|>"
_ENDS: Final = ("<|end|>", "<|call|>", "<|return|>")
MARKERS: Final = (_CHANNEL, _MESSAGE, _START, _CONSTRAIN, *_ENDS)


def is_spoken_by(template: str) -> bool:
    return _CHANNEL in template and _MESSAGE in template


class HarmonyParser:
    """Splits harmony into reasoning, content and calls. Text outside any body is content: nothing is lost."""

    def __init__(self, schemas: ToolSchemas) -> None:
        self._schemas = schemas
        self._finder = MarkerFinder(MARKERS)
        self._tail = ""
        self._is_header = False
        self._header: list[str] = []
        self._is_reasoning = False  # the body is
        self._recipient = ""
        self._reader: NamedCallReader | None = None  # of a body that is the arguments of a call

    def feed(self, text: str) -> list[Part]:
        found: list[Part] = []
        text = self._tail + text if self._tail else text
        self._tail = ""
        position = 0
        while position < len(text):
            start, marker = self._finder.find(text, position)
            if start < 0:
                cut = len(text) - self._finder.undecided(text, position)
                self._add(text[position:cut], found)
                self._tail = text[cut:]
                break
            self._add(text[position:start], found)
            self._mark(marker, found)
            position = start + len(marker)
        return found

    def finish(self) -> list[Part]:
        found: list[Part] = []
        self._add(self._tail, found)
        self._tail = ""
        self._end_body(found, "unfinished_tool_call")
        return found

    def _add(self, text: str, found: list[Part]) -> None:
        if not text:
            return
        if self._is_header:
            self._header.append(text)
        elif self._reader is not None and not self._reader.is_broken:
            if not _give(self._reader, self._reader.feed(text), found):
                self._give_up(self._reader, "malformed_tool_call", found)
        else:
            found.append(Reasoning(text) if self._is_reasoning else text)

    def _mark(self, marker: str, found: list[Part]) -> None:
        if marker == _MESSAGE:
            self._begin_body(found)
        elif marker == _CONSTRAIN:
            self._header.append(" ")
        elif marker == _CHANNEL and self._is_header:
            self._header.append(" <channel> ")
        else:
            self._end_body(found, "malformed_tool_call")
            self._is_header = marker in (_START, _CHANNEL)
            self._header = [" <channel> "] if marker == _CHANNEL else []

    def _begin_body(self, found: list[Part]) -> None:
        words = "".join(self._header).split()
        self._is_header, self._header = False, []
        channel = words[words.index("<channel>") + 1] if "<channel>" in words[:-1] else "final"
        recipient = next((word[3:] for word in words if word.startswith("to=")), "")
        self._end_body(found, "malformed_tool_call")
        if recipient.startswith("functions."):
            call = CallStart(recipient.removeprefix("functions."))
            self._recipient = call.name
            if self._schemas and call.name not in self._schemas:
                found.append(ParseWarning("unknown_tool", shortened(call.name)))
            self._reader = NamedCallReader(lambda head, is_end: None if head.strip() else [] if is_end else [call])
        else:
            self._is_reasoning = channel == "analysis" or bool(recipient)

    def _end_body(self, found: list[Part], kind: WarningKind) -> None:
        reader, self._reader = self._reader, None
        self._is_reasoning = False
        if reader is None or reader.is_broken:
            return
        parts = reader.finish()
        if _give(reader, parts, found):
            return
        if not parts and kind == "malformed_tool_call" and not reader.rest.strip():
            found += whole_call(self._recipient, "{}")  # an empty body
        else:
            self._give_up(reader, kind, found)

    def _give_up(self, reader: NamedCallReader, kind: WarningKind, found: list[Part]) -> None:
        found.append(ParseWarning(kind, shortened(self._recipient)))
        if reader.rest:
            found.append(reader.rest)


def _give(reader: NamedCallReader, parts: list[Part], found: list[Part]) -> bool:
    """Gives out what the reader just read; whether it goes on."""
    found += parts
    return not reader.is_broken
