"""GPT-OSS: OpenAI's harmony. A message is a sequence of channels, each a header and a body between markers.

`analysis` is reasoning, `final` and `commentary` without a recipient are content, and a recipient `functions.NAME`
makes a body the arguments of a call.
"""

from __future__ import annotations

from typing import Final

from penstock.frontend.parsers.edges import MarkerFinder
from penstock.frontend.parsers.json_calls import arguments_text
from penstock.frontend.parsers.parts import ParseWarning, Part, Reasoning, ToolCall, ToolSchemas, shortened

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
        self._kind = "content"  # of the body: content, reasoning or call
        self._recipient = ""
        self._body: list[str] = []  # of a call, which is held until its end
        self._starts_body = False  # the next text is the first of its body

    def feed(self, text: str) -> list[Part]:
        found: list[Part] = []
        rest = self._tail + text if self._tail else text
        self._tail = ""
        while rest:
            start, marker = self._finder.find(rest)
            if start < 0:
                cut = len(rest) - self._finder.undecided(rest)
                self._add(rest[:cut], found)
                self._tail = rest[cut:]
                break
            self._add(rest[:start], found)
            self._mark(marker, found)
            rest = rest[start + len(marker) :]
        return found

    def finish(self) -> list[Part]:
        found: list[Part] = []
        self._add(self._tail, found)
        self._tail = ""
        self._end_body(found, is_complete=False)
        return found

    def _add(self, text: str, found: list[Part]) -> None:
        if not text:
            return
        if self._is_header:
            self._header.append(text)
        elif self._kind == "call":
            self._body.append(text)
        else:
            found.append(Reasoning(text) if self._kind == "reasoning" else text)

    def _mark(self, marker: str, found: list[Part]) -> None:
        if marker == _MESSAGE:
            self._begin_body()
        elif marker == _CONSTRAIN:
            self._header.append(" ")
        elif marker == _CHANNEL and self._is_header:
            self._header.append(" <channel> ")
        else:
            self._end_body(found, is_complete=True)
            self._is_header = marker in (_START, _CHANNEL)
            self._header = [" <channel> "] if marker == _CHANNEL else []

    def _begin_body(self) -> None:
        words = "".join(self._header).split()
        self._is_header, self._header = False, []
        channel = words[words.index("<channel>") + 1] if "<channel>" in words[:-1] else "final"
        recipient = next((word[3:] for word in words if word.startswith("to=")), "")
        if recipient.startswith("functions."):
            self._kind, self._recipient = "call", recipient.removeprefix("functions.")
        else:
            self._kind = "reasoning" if channel == "analysis" or recipient else "content"

    def _end_body(self, found: list[Part], *, is_complete: bool) -> None:
        kind, self._kind = self._kind, "content"
        if kind != "call" or self._is_header:
            return
        text, self._body = "".join(self._body), []
        arguments = arguments_text(text)
        if arguments is None:
            found.append(
                ParseWarning("malformed_tool_call" if is_complete else "unfinished_tool_call", shortened(text))
            )
            if text:
                found.append(text)
            return
        if self._schemas and self._recipient not in self._schemas:
            found.append(ParseWarning("unknown_tool", shortened(self._recipient)))
        found.append(ToolCall(self._recipient, arguments))
