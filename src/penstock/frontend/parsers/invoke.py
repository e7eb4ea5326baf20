"""MiniMax M2 and DeepSeek V3.2: `<invoke name="NAME"><parameter name="KEY">value</parameter></invoke>` in a block."""

from __future__ import annotations

import re
from typing import Any, Final

from penstock.frontend.parsers.blocks import Block, ToolFormat, read_whole
from penstock.frontend.parsers.json_calls import object_json, typed_value
from penstock.frontend.parsers.parts import Part, ToolSchemas, whole_call

_DSML: Final = "｜DSML｜"  # stands before every tag of DeepSeek's
_ATTRIBUTES: Final = re.compile(r'^\s*name="([^"]*)"(?:\s+string="(true|false)")?\s*>')


def parse(text: str, schemas: ToolSchemas) -> list[Part] | None:
    calls: list[Part] = []
    head, *pieces = text.split("<invoke")
    for piece in pieces:
        opened = _ATTRIBUTES.match(piece)
        if opened is None:
            return None
        body, _, after = piece[opened.end() :].partition("</invoke>")
        values = _values(body, schemas.get(opened[1], {}))
        arguments = None if values is None else object_json(values)
        if not opened[1] or arguments is None or after.strip():
            return None
        calls += whole_call(opened[1], arguments)
    return calls if calls and not head.strip() else None


def parse_dsml(text: str, schemas: ToolSchemas) -> list[Part] | None:
    return parse(text.replace(_DSML, ""), schemas)


def _values(body: str, properties: Any) -> dict[str, Any] | None:
    values: dict[str, Any] = {}
    head, *pieces = body.split("<parameter")
    for piece in pieces:
        opened = _ATTRIBUTES.match(piece)
        if opened is None:
            return None
        value, closed, after = piece[opened.end() :].partition("</parameter>")
        if not closed or after.strip():
            return None
        schema = {"type": "string"} if opened[2] == "true" else properties.get(opened[1])
        values[opened[1]] = typed_value(value, schema)
    return None if head.strip() else values


FORMAT = ToolFormat(
    "invoke",
    (("<minimax:tool_call>",), (f"<{_DSML}function_calls>",), (f"{_DSML}invoke",)),
    (
        Block("<minimax:tool_call>", "</minimax:tool_call>", read_whole(parse)),
        Block(f"<{_DSML}function_calls>", f"</{_DSML}function_calls>", read_whole(parse_dsml)),
    ),
)
