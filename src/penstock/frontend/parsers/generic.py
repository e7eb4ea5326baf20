"""A format learnt from a chat template that no named format knows: a probe call is rendered, and what stands around it
are the markers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from penstock.base.errors import ValidationError
from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.parsers.blocks import Block, ParseBlock, ToolFormat
from penstock.frontend.parsers.json_calls import arguments_text, parse_json_calls
from penstock.frontend.parsers.parts import ToolCall, ToolSchemas

_NAME: Final = "probe_tool_name"
_KEY: Final = "probe_key"
_VALUE: Final = "probe value"
_ANSWER: Final = "probe answer"
_MAX_MARKER_CHARS: Final = 200
_USER: Final = {"role": "user", "content": "probe question"}
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
    },
}


def learn_format(template: ChatTemplate) -> ToolFormat | None:
    """The format that the template writes an assistant's call in; None where it writes none that can be found again."""
    if not template:
        return None
    try:
        asked = template.render([_USER], [_TOOL], add_generation_prompt=True).text
        called = template.render([_USER, _call_message(template)], [_TOOL], add_generation_prompt=False).text
        answered = template.render(
            [_USER, {"role": "assistant", "content": _ANSWER}], [_TOOL], add_generation_prompt=False
        ).text
    except ValidationError:
        return None
    if not called.startswith(asked) or _ANSWER not in answered:
        return None
    turn_end = answered[answered.rindex(_ANSWER) + len(_ANSWER) :].strip()
    written = called[len(asked) :].rstrip().removesuffix(turn_end)
    return _from_json(written) or _from_named(written)


def _call_message(template: ChatTemplate) -> dict[str, Any]:
    arguments = {_KEY: _VALUE}
    takes_text = template.takes_argument_text([_TOOL])
    function = {"name": _NAME, "arguments": json.dumps(arguments) if takes_text else arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


def _from_json(written: str) -> ToolFormat | None:
    """The call is one JSON value that holds name and arguments."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"[\[{]", written[: max(written.find(_NAME), 0)]):
        try:
            value, end = decoder.raw_decode(written, match.start())
        except ValueError:
            continue
        item = value[0] if isinstance(value, list) and value else value
        keys = _keys_of(item) if isinstance(item, dict) else None
        if keys is not None:
            return _format(written[: match.start()], written[end:], _json_parse(*keys), first_key=next(iter(item)))
    return None


def _keys_of(item: Mapping[str, Any]) -> tuple[str, str] | None:
    """The names of the members that hold the name and the arguments; ("", "") for OpenAI's nesting."""
    if isinstance(item.get("function"), dict):
        return ("", "")
    name = next((key for key, value in item.items() if value == _NAME), None)
    arguments = next(
        (key for key, value in item.items() if value == {_KEY: _VALUE} or (isinstance(value, str) and _VALUE in value)),
        None,
    )
    return None if name is None or arguments is None else (name, arguments)


def _json_parse(name_key: str, arguments_key: str) -> ParseBlock:
    renamed = {name_key: "name", arguments_key: "arguments"}

    def parse(text: str, schemas: ToolSchemas) -> list[ToolCall] | None:
        found = parse_json_calls(text, schemas)
        if found is not None:
            return found
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, dict) for item in items):
            return None
        plain = [{renamed.get(key, key): inner for key, inner in item.items()} for item in items]
        return parse_json_calls(json.dumps(plain, ensure_ascii=False), schemas)

    return parse


def _from_named(written: str) -> ToolFormat | None:
    """The call is the bare name, a separator, and the arguments as JSON."""
    start = written.find(_NAME)
    brace = written.find("{", start)
    if start < 0 or brace < 0:
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(written, brace)
    except ValueError:
        return None
    separator = written[start + len(_NAME) : brace]
    if value != {_KEY: _VALUE} or not separator.strip():
        return None

    def parse(text: str, schemas: ToolSchemas) -> list[ToolCall] | None:  # noqa: ARG001 - a ParseBlock
        name, mark, rest = text.partition(separator.strip())
        arguments = arguments_text(rest)
        return [ToolCall(name.strip(), arguments)] if mark and name.strip() and arguments is not None else None

    return _format(written[:start], written[end:], parse, first_key=None)


def _format(before: str, after: str, parse: ParseBlock, *, first_key: str | None) -> ToolFormat | None:
    opening, closing = before.strip(), after.strip()
    if max(len(opening), len(closing)) > _MAX_MARKER_CHARS:
        return None
    if opening:
        # One marker inside another could not be told apart: then the text ends where the message does.
        closing = "" if opening in closing or closing in opening else closing
        return ToolFormat("generic", (), (Block(opening, closing, parse),))
    if first_key is None or closing:
        return None
    prefix = re.compile(r"\[?\s*\{\s*" + re.escape(json.dumps(first_key)) + r"\s*:")
    return ToolFormat("generic", (), tuple(Block(begin, "", parse, prefix) for begin in "[{"))
