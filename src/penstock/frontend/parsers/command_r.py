"""Command R7B and Command A: a JSON list between action markers; Command R: the same in a fence behind `Action:`."""

from __future__ import annotations

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.call_readers import CallReader, JsonCallReader
from penstock.frontend.parsers.parts import ToolSchemas


def read(schemas: ToolSchemas) -> CallReader:
    """`directly_answer` is no tool: it is the model's word for answering in text."""
    return JsonCallReader(schemas, hidden=("directly_answer", "directly-answer"))


FORMAT = ToolFormat(
    "command_r",
    (("<|START_ACTION|>",), ("Action: ```json",), ("Action:```json",)),
    (
        Block("<|START_ACTION|>", "<|END_ACTION|>", read),
        Block("Action: ```json\n", "\n```", read),
        Block("Action:```json\n", "\n```", read),
    ),
    dropped=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
)
