"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, since v11 `[TOOL_CALLS]NAME[ARGS]{...}` for each."""

from __future__ import annotations

from typing import Final

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.json_calls import arguments_text, parse_json_calls
from penstock.frontend.parsers.parts import ToolCall, ToolSchemas

_OPEN: Final = "[TOOL_CALLS]"


def parse(text: str, schemas: ToolSchemas) -> list[ToolCall] | None:
    calls: list[ToolCall] = []
    for piece in text.split(_OPEN):
        found = parse_json_calls(piece, schemas) if piece.lstrip()[:1] in ("[", "{") else _named(piece)
        if found is None:
            return None
        calls += found
    return calls


def _named(text: str) -> list[ToolCall] | None:
    """NAME[CALL_ID]id[ARGS]{...}, or NAME{...} where the markers were left out."""
    head, mark, body = text.partition("[ARGS]")
    if not mark:
        head, brace, body = text.partition("{")
        body = brace + body
    name, _, call_id = head.partition("[CALL_ID]")
    arguments = arguments_text(body)
    if not name.strip() or arguments is None or " " in name.strip():
        return None
    return [ToolCall(name.strip(), arguments, call_id.strip())]


FORMAT = ToolFormat("mistral", ((_OPEN,),), (Block(_OPEN, "", parse),), inner=("[ARGS]", "[CALL_ID]"))
