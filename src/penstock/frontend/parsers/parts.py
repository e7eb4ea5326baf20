"""The parts of a message, as every parser gives them out. A streamed and a whole answer are folds of the same parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

WarningKind = Literal["malformed_tool_call", "unknown_tool", "unfinished_tool_call", "unfinished_output"]
MAX_DETAIL_CHARS = 200


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins: its arguments and its end follow, and nothing else in between but warnings.

    call_id: the model's own name for the call, where its format has one and a later turn must repeat it.
    """

    name: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the text of a JSON object, as the model writes it where it writes JSON."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """is_complete: the arguments are a JSON object; otherwise a warning follows, and they are the beginning of one."""

    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call: what merge_parts makes of the three parts above."""

    name: str
    arguments: str
    call_id: str = ""
    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class ParseWarning:
    """Something a client should know about the text around it. detail: the beginning of what it is about.

    malformed_tool_call: it looked like a call and is none: it is in the content, or a call that is not complete.
    unfinished_tool_call: the same, where the text ended inside it.
    unknown_tool: a well-formed call of a tool that the request does not have.
    unfinished_output: max_tokens cut off an answer that has to obey a grammar, so it does not.
    """

    kind: WarningKind
    detail: str


Part = str | Reasoning | CallStart | CallArguments | CallEnd | ParseWarning  # a str is content
MessagePart = str | Reasoning | ToolCall | ParseWarning

ToolSchemas = Mapping[str, Mapping[str, Any]]  # by tool name: the properties of its JSON schema


class PartParser(Protocol):
    """Turns text in pieces into parts. What comes out, merged, does not depend on how the text was cut."""

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now that this text follows."""
        ...

    def finish(self) -> list[Part]:
        """What the end of the text decides. Call once."""
        ...


def merge_parts(parts: Iterable[Part]) -> list[MessagePart]:
    """The parts with neighbouring pieces joined, warnings last: what a whole answer holds."""
    merged: list[MessagePart] = []
    warnings: list[MessagePart] = []
    run: list[str] = []
    kind: type | None = None  # of the text in `run`
    call = CallStart("")
    for part in parts:
        if isinstance(part, ParseWarning):
            warnings.append(part)
        elif isinstance(part, CallArguments):
            run.append(part.text)
        elif isinstance(part, CallEnd):
            merged.append(ToolCall(call.name, "".join(run), call.call_id, part.is_complete))
            run = []
        else:
            if run and kind is not type(part):
                merged.append(_text_part(run, kind))
                run = []
            kind = type(part)
            if isinstance(part, CallStart):
                call = part
            else:
                run.append(part.text if isinstance(part, Reasoning) else part)
    if run:
        merged.append(_text_part(run, kind))
    return merged + warnings


def _text_part(run: list[str], kind: type | None) -> MessagePart:
    text = "".join(run)
    return Reasoning(text) if kind is Reasoning else text


def whole_call(name: str, arguments: str, call_id: str = "") -> list[Part]:
    """The parts of a call that is complete."""
    return [CallStart(name, call_id), CallArguments(arguments), CallEnd()]


def shortened(text: str) -> str:
    return text if len(text) <= MAX_DETAIL_CHARS else text[:MAX_DETAIL_CHARS] + "..."
