"""DeepSeek V3, R1 (name, then JSON in a fence) and V3.1 (name, separator, JSON), in markers of full-width bars."""

from __future__ import annotations

from typing import Final

from penstock.frontend.parsers.blocks import Block, ToolFormat, split_calls
from penstock.frontend.parsers.json_calls import arguments_text
from penstock.frontend.parsers.parts import ToolCall, ToolSchemas

_BEGIN: Final = "<｜tool▁calls▁begin｜>"
_END: Final = "<｜tool▁calls▁end｜>"
_CALL: Final = "<｜tool▁call▁begin｜>"
_CALL_END: Final = "<｜tool▁call▁end｜>"
_SEPARATOR: Final = "<｜tool▁sep｜>"


def parse(text: str, schemas: ToolSchemas) -> list[ToolCall] | None:  # noqa: ARG001 - a ParseBlock
    return split_calls(text, _CALL, _call)


def _call(text: str) -> ToolCall | None:
    body, _, after = text.partition(_CALL_END)
    name, mark, rest = body.partition(_SEPARATOR)
    if not mark or after.strip():
        return None
    if name.strip() == "function" and "```" in rest:
        name, _, fenced = rest.partition("```")
        rest = fenced.strip().removeprefix("json").removesuffix("```")
    arguments = arguments_text(rest)
    return ToolCall(name.strip(), arguments) if name.strip() and arguments is not None else None


FORMAT = ToolFormat("deepseek", ((_BEGIN,),), (Block(_BEGIN, _END, parse),), inner=(_CALL, _CALL_END, _SEPARATOR))
