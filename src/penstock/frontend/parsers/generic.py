"""A format learnt from a chat template that no named format knows: a probe call is rendered, and what stands around it
are the markers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from penstock.base.errors import ValidationError
from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.parsers.blocks import Block, ToolFormat
from penstock.frontend.parsers.call_readers import JsonCallReader, NamedCallReader, ReadCalls
from penstock.frontend.parsers.json_calls import ARGUMENT_KEYS, NAME_KEYS
from penstock.frontend.parsers.parts import CallStart

PROBE_NAME: Final = "probe_tool_name"
PROBE_KEY: Final = "probe_key"
PROBE_VALUE: Final = "probe value"
_ANSWER: Final = "probe answer"
_MAX_MARKER_CHARS: Final = 200
_USER: Final = {"role": "user", "content": "probe question"}
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {PROBE_KEY: {"type": "string"}}},
    },
}


def learn_format(template: ChatTemplate) -> ToolFormat | None:
    """The format that the template writes an assistant's call in; None where it writes none that can be found again."""
    written = written_call(template)
    return None if written is None else _from_json(written) or _from_named(written)


def written_call(template: ChatTemplate) -> str | None:
    """What the template writes for a call of the probe tool."""
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
    return called[len(asked) :].rstrip().removesuffix(turn_end)


def _call_message(template: ChatTemplate) -> dict[str, Any]:
    arguments = {PROBE_KEY: PROBE_VALUE}
    takes_text = template.takes_argument_text([_TOOL])
    function = {"name": PROBE_NAME, "arguments": json.dumps(arguments) if takes_text else arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


def _from_json(written: str) -> ToolFormat | None:
    """The call is one JSON value that holds name and arguments."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"[\[{]", written[: max(written.find(PROBE_NAME), 0)]):
        try:
            value, end = decoder.raw_decode(written, match.start())
        except ValueError:
            continue
        item = value[0] if isinstance(value, list) and value else value
        keys = _keys_of(item) if isinstance(item, dict) else None
        if keys is not None:
            before, after = written[: match.start()], written[end:]
            return _format(before, after, _json_reader(*keys, is_bare=not before.strip()), first_key=next(iter(item)))
    return None


def _keys_of(item: Mapping[str, Any]) -> tuple[str, str] | None:
    """The names of the members that hold the name and the arguments; ("", "") for OpenAI's nesting."""
    if isinstance(item.get("function"), dict):
        return ("", "")
    name = next((key for key, value in item.items() if value == PROBE_NAME), None)
    arguments = next(
        (
            key
            for key, value in item.items()
            if value == {PROBE_KEY: PROBE_VALUE} or (isinstance(value, str) and PROBE_VALUE in value)
        ),
        None,
    )
    return None if name is None or arguments is None else (name, arguments)


def _json_reader(name_key: str, arguments_key: str, *, is_bare: bool) -> ReadCalls:
    names, arguments = (*filter(None, (name_key,)), *NAME_KEYS), (*filter(None, (arguments_key,)), *ARGUMENT_KEYS)
    return lambda schemas: JsonCallReader(schemas, names=names, arguments=arguments, is_bare=is_bare)


def _from_named(written: str) -> ToolFormat | None:
    """The call is the bare name, a separator, and the arguments as JSON."""
    start = written.find(PROBE_NAME)
    brace = written.find("{", start)
    if start < 0 or brace < 0:
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(written, brace)
    except ValueError:
        return None
    separator = written[start + len(PROBE_NAME) : brace]
    if value != {PROBE_KEY: PROBE_VALUE} or not separator.strip():
        return None

    mark = separator.strip()

    def starts(head: str, is_end: bool) -> list[CallStart] | None:
        if is_end:
            return None if head.strip() else []
        name, found, rest = head.partition(mark)
        return [CallStart(name.strip())] if found and name.strip() and not rest.strip() else None

    return _format(written[:start], written[end:], lambda _: NamedCallReader(starts), first_key=None)


def _format(before: str, after: str, read: ReadCalls, *, first_key: str | None) -> ToolFormat | None:
    opening, closing = before.strip(), after.strip()
    if max(len(opening), len(closing)) > _MAX_MARKER_CHARS:
        return None
    if opening:
        # One marker inside another could not be told apart: then the text ends where the message does.
        closing = "" if opening in closing or closing in opening else closing
        return ToolFormat("generic", (), (Block(opening, closing, read),))
    if first_key is None or closing:
        return None
    prefix = re.compile(r"\[?\s*\{\s*" + re.escape(json.dumps(first_key)) + r"\s*:")
    return ToolFormat("generic", (), tuple(Block(begin, "", read, prefix) for begin in "[{"))
