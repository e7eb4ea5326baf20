"""Qwen3-Coder and Seed: `<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>`."""

from __future__ import annotations

from typing import Any, Final

from penstock.frontend.parsers.blocks import Block, ToolFormat, read_whole
from penstock.frontend.parsers.json_calls import object_json, typed_value
from penstock.frontend.parsers.parts import Part, ToolSchemas, whole_call

_FUNCTION: Final = "<function="
_PARAMETER: Final = "<parameter="
_END: Final = "</parameter>"


def parse(text: str, schemas: ToolSchemas) -> list[Part] | None:
    calls: list[Part] = []
    head, *functions = text.split(_FUNCTION)
    if head.strip() or not functions:
        return None
    for function in functions:
        name, mark, body = function.partition(">")
        name = name.strip()
        values = _values(body.rpartition("</function>")[0] or body, schemas.get(name, {}))
        arguments = None if values is None else object_json(values)
        if not mark or not name or arguments is None:
            return None
        calls += whole_call(name, arguments)
    return calls


def _values(body: str, properties: Any) -> dict[str, Any] | None:
    values: dict[str, Any] = {}
    head, *parameters = body.split(_PARAMETER)
    if head.strip():
        return None
    for parameter in parameters:
        key, mark, rest = parameter.partition(">")
        value, _, after = rest.partition(_END)
        if not mark or not key.strip() or after.strip():
            return None
        # One line break on each side belongs to the markup.
        value = value.removeprefix("\n").removesuffix("\n")
        values[key.strip()] = typed_value(value, properties.get(key.strip()))
    return values


FORMAT = ToolFormat(
    "qwen_coder",
    (("<tool_call>", _FUNCTION, _PARAMETER), ("<seed:tool_call>",)),
    (
        Block("<tool_call>", "</tool_call>", read_whole(parse)),
        Block("<seed:tool_call>", "</seed:tool_call>", read_whole(parse)),
    ),
)
