"""Granite 3 and Phi-4-mini: `<|tool_call|>[{"name": ..., "arguments": {...}}]`; 20B: `<function_call> {...}`."""

from __future__ import annotations

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.call_readers import JsonCallReader

FORMAT = ToolFormat(
    "granite",
    (("<|tool_call|>",), ("<function_call>",)),
    (Block("<|tool_call|>", "<|/tool_call|>", JsonCallReader), Block("<function_call>", "", JsonCallReader)),
)
