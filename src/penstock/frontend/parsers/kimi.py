"""Kimi K2: a section of calls `functions.NAME:INDEX` with JSON arguments. The whole name is the call's id."""

from __future__ import annotations

from typing import Final

from penstock.frontend.parsers.blocks import Block, ToolFormat, split_calls
from penstock.frontend.parsers.json_calls import arguments_text
from penstock.frontend.parsers.parts import ToolCall, ToolSchemas

_BEGIN: Final = "<|tool_calls_section_begin|>"
_END: Final = "<|tool_calls_section_end|>"
_CALL: Final = "<|tool_call_begin|>"
_CALL_END: Final = "<|tool_call_end|>"
_ARGUMENTS: Final = "<|tool_call_argument_begin|>"


def parse(text: str, schemas: ToolSchemas) -> list[ToolCall] | None:  # noqa: ARG001 - a ParseBlock
    return split_calls(text, _CALL, _call)


def _call(text: str) -> ToolCall | None:
    body, _, after = text.partition(_CALL_END)
    call_id, mark, rest = body.partition(_ARGUMENTS)
    call_id = call_id.strip()
    name = call_id.removeprefix("functions.").rpartition(":")[0] or call_id
    arguments = arguments_text(rest)
    if not mark or after.strip() or not name or arguments is None:
        return None
    return ToolCall(name, arguments, call_id)


FORMAT = ToolFormat(
    "kimi",
    ((_BEGIN,), ("<|im_middle|>", "tool_declare")),
    (Block(_BEGIN, _END, parse),),
    inner=(_CALL, _CALL_END, _ARGUMENTS),
)
