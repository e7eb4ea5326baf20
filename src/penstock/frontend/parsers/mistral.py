"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, since v11 `[TOOL_CALLS]NAME[ARGS]{...}` for each."""

from __future__ import annotations

from typing import Final

from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.call_readers import CallReader, FirstCharacterReader, JsonCallReader, NamedCallReader
from penstock.frontend.parsers.parts import CallStart, ToolSchemas

_OPEN: Final = "[TOOL_CALLS]"


def read(schemas: ToolSchemas) -> CallReader:
    return FirstCharacterReader(lambda first: JsonCallReader(schemas) if first in "[{" else NamedCallReader(_starts))


def _starts(head: str, is_end: bool) -> list[CallStart] | None:
    """NAME[CALL_ID]id[ARGS], or NAME where the markers were left out; nothing behind the arguments."""
    if is_end:
        return None if head.strip() else []
    named, _, rest = head.partition("[ARGS]")
    name, _, call_id = named.partition("[CALL_ID]")
    name = name.strip()
    return [CallStart(name, call_id.strip())] if name and " " not in name and not rest.strip() else None


FORMAT = ToolFormat("mistral", ((_OPEN,),), (Block(_OPEN, "", read),), inner=("[ARGS]", "[CALL_ID]"))
