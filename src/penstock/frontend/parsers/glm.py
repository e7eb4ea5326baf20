"""GLM 4.5: `<tool_call>NAME <arg_key>KEY</arg_key><arg_value>value</arg_value> ...</tool_call>`, values bare."""

from __future__ import annotations

from typing import Any, Final

from penstock.frontend.parsers.blocks import Block, ToolFormat, read_whole
from penstock.frontend.parsers.json_calls import object_json, typed_value
from penstock.frontend.parsers.parts import Part, ToolSchemas, whole_call

_KEY: Final = "<arg_key>"


def parse(text: str, schemas: ToolSchemas) -> list[Part] | None:
    head, *pairs = text.split(_KEY)
    name = head.strip()
    if not name or "<" in name or "{" in name:
        return None
    properties = schemas.get(name, {})
    values: dict[str, Any] = {}
    for pair in pairs:
        key, mark, rest = pair.partition("</arg_key>")
        before, opened, rest = rest.partition("<arg_value>")
        value, closed, after = rest.partition("</arg_value>")
        if not (mark and opened and closed) or before.strip() or after.strip():
            return None
        values[key.strip()] = typed_value(value, properties.get(key.strip()))
    arguments = object_json(values)
    return None if arguments is None else whole_call(name, arguments)


FORMAT = ToolFormat("glm", ((_KEY, "<arg_value>"),), (Block("<tool_call>", "</tool_call>", read_whole(parse)),))
