"""Kimi K2: a section of calls `functions.NAME:INDEX` with JSON arguments. The whole name is the call's id."""

from __future__ import annotations

from typing import Final

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.call_readers import CallReader, NamedCallReader, parse_marked_heads
from penstock.frontend.parsers.parts import CallStart, ToolSchemas

_BEGIN: Final = "<|tool_calls_section_begin|>"
_END: Final = "<|tool_calls_section_end|>"
_CALL: Final = "<|tool_call_begin|>"
_CALL_END: Final = "<|tool_call_end|>"
_ARGUMENTS: Final = "<|tool_call_argument_begin|>"


def read(_schemas: ToolSchemas) -> CallReader:
    return NamedCallReader(lambda head, is_end: parse_marked_heads(head, _CALL, _CALL_END, _start, is_end=is_end))


def _start(head: str) -> CallStart | None:
    call_id, mark, rest = head.partition(_ARGUMENTS)
    call_id = call_id.strip()
    name = call_id.removeprefix("functions.").rpartition(":")[0] or call_id
    return CallStart(name, call_id) if mark and name and not rest.strip() else None


FORMAT = ToolFormat(
    "kimi",
    ((_BEGIN,), ("<|im_middle|>", "tool_declare")),
    (Block(_BEGIN, _END, read),),
    inner=(_CALL, _CALL_END, _ARGUMENTS),
)
