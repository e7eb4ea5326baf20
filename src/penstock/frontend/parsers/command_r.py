"""Command R7B and Command A: a JSON list between action markers; Command R: the same in a fence behind `Action:`."""

from __future__ import annotations

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.json_calls import parse_json_calls
from penstock.frontend.parsers.parts import ToolCall, ToolSchemas


def parse(text: str, schemas: ToolSchemas) -> list[ToolCall] | None:
    """`directly_answer` is no tool: it is the model's word for answering in text."""
    calls = parse_json_calls(text, schemas)
    if calls is None:
        return None
    return [call for call in calls if call.name not in ("directly_answer", "directly-answer")]


FORMAT = ToolFormat(
    "command_r",
    (("<|START_ACTION|>",), ("Action: ```json",), ("Action:```json",)),
    (
        Block("<|START_ACTION|>", "<|END_ACTION|>", parse),
        Block("Action: ```json\n", "\n```", parse),
        Block("Action:```json\n", "\n```", parse),
    ),
    dropped=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
)
