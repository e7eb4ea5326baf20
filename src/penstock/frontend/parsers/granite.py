"""Granite 3 and Phi-4-mini: `<|tool_call|>[{"name": ..., "arguments": {...}}]`; 20B: `<function_call> {...}`."""

from __future__ import annotations

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.json_calls import parse_json_calls
from penstock.frontend.parsers.parts import ToolCall, ToolSchemas


def parse(text: str, schemas: ToolSchemas) -> list[ToolCall] | None:
    pieces = text.removesuffix("<|/tool_call|>").replace("<function_call>", "\n")
    return parse_json_calls(pieces, schemas)


FORMAT = ToolFormat(
    "granite",
    (("<|tool_call|>",), ("<function_call>",)),
    (Block("<|tool_call|>", "", parse), Block("<function_call>", "", parse)),
    inner=("<|/tool_call|>",),
)
