"""The parts of a message, as every parser gives them out. A streamed and a whole answer are folds of the same parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

WarningKind = Literal["malformed_tool_call", "unknown_tool", "unfinished_tool_call"]
MAX_DETAIL_CHARS = 200


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call. arguments: the text of a JSON object, as the model wrote it where it wrote JSON.

    call_id: the model's own name for the call, where its format has one and a later turn must repeat it.
    """

    name: str
    arguments: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class ParseWarning:
    """Something a client should know about the text around it. detail: the beginning of what it is about.

    malformed_tool_call: it looked like a call and is none; it was left in the content.
    unfinished_tool_call: the same, where the text ended inside it.
    unknown_tool: a well-formed call of a tool that the request does not have.
    """

    kind: WarningKind
    detail: str


Part = str | Reasoning | ToolCall | ParseWarning  # a str is content

ToolSchemas = Mapping[str, Mapping[str, Any]]  # by tool name: the properties of its JSON schema


class PartParser(Protocol):
    """Turns text in pieces into parts. What comes out, merged, does not depend on how the text was cut."""

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now that this text follows."""
        ...

    def finish(self) -> list[Part]:
        """What the end of the text decides. Call once."""
        ...


def merge_parts(parts: Iterable[Part]) -> list[Part]:
    """The parts with neighbouring pieces of text joined, warnings last: what a whole answer holds."""
    merged: list[Part] = []
    warnings: list[Part] = []
    run: list[str] = []
    kind: type | None = None
    for part in parts:
        if isinstance(part, ParseWarning):
            warnings.append(part)
            continue
        if run and kind is not type(part):
            merged.append(_text_part(run, kind))
            run = []
        kind = type(part)
        if isinstance(part, ToolCall):
            merged.append(part)
        else:
            run.append(part.text if isinstance(part, Reasoning) else part)
    if run:
        merged.append(_text_part(run, kind))
    return merged + warnings


def _text_part(run: list[str], kind: type | None) -> Part:
    text = "".join(run)
    return Reasoning(text) if kind is Reasoning else text


def shortened(text: str) -> str:
    return text if len(text) <= MAX_DETAIL_CHARS else text[:MAX_DETAIL_CHARS] + "..."
