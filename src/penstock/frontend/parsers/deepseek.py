"""DeepSeek V3, R1 (name, then JSON in a fence) and V3.1 (name, separator, JSON), in markers of full-width bars."""

from __future__ import annotations

import re
from typing import Final

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.call_readers import CallReader, NamedCallReader, parse_marked_heads
from penstock.frontend.parsers.parts import CallStart, ToolSchemas

_BEGIN: Final = "<｜tool▁calls▁begin｜>"
_END: Final = "<｜tool▁calls▁end｜>"
_CALL: Final = "<｜tool▁call▁begin｜>"
_CALL_END: Final = "<｜tool▁call▁end｜>"
_SEPARATOR: Final = "<｜tool▁sep｜>"
_FENCED: Final = re.compile(r"\s*function\s*" + _SEPARATOR + r"([^`{}]+)```(?:json)?\s*(?:```\s*)?")
_PLAIN: Final = re.compile(r"([^`{}]+)" + _SEPARATOR + r"\s*")


def read(_schemas: ToolSchemas) -> CallReader:
    return NamedCallReader(lambda head, is_end: parse_marked_heads(head, _CALL, _CALL_END, _start, is_end=is_end))


def _start(head: str) -> CallStart | None:
    match = _FENCED.fullmatch(head) or _PLAIN.fullmatch(head)
    name = match[1].strip() if match is not None else ""
    return CallStart(name) if name else None


FORMAT = ToolFormat("deepseek", ((_BEGIN,),), (Block(_BEGIN, _END, read),), inner=(_CALL, _CALL_END, _SEPARATOR))
