"""Calls that are written as JSON: {"name": ..., "arguments": {...}} under the names that models give these keys."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from penstock.frontend.parsers.parts import ToolCall, ToolSchemas

_NAMES: Final = ("name", "tool_name", "function")
_ARGUMENTS: Final = ("arguments", "parameters", "args")
_IDS: Final = ("id", "tool_call_id")
_item_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_object_decoder = msgspec.json.Decoder(dict[str, object])
_text_decoder = msgspec.json.Decoder(str)
_FAILURES: Final = (msgspec.MsgspecError, ValueError, RecursionError)


def parse_json_call(text: str | bytes) -> ToolCall | None:
    """One call from one JSON object; None where it is none."""
    try:
        fields = _item_decoder.decode(text.encode() if isinstance(text, str) else text)
        inner = fields.get("function")
        if inner is not None and bytes(inner).lstrip().startswith(b"{"):  # OpenAI's own nesting
            fields = {**fields, **_item_decoder.decode(inner)}
            del fields["function"]
        name = next((_text_decoder.decode(fields[key]) for key in _NAMES if key in fields), "")
        raw = next((fields[key] for key in _ARGUMENTS if key in fields), None)
        arguments = "{}" if raw is None else _object_text(bytes(raw).decode())
        call_id = next((_text_decoder.decode(fields[key]) for key in _IDS if _is_text(fields.get(key))), "")
    except _FAILURES:
        return None
    return ToolCall(name, arguments, call_id) if name and arguments is not None else None


def parse_json_calls(text: str, schemas: ToolSchemas) -> list[ToolCall] | None:  # noqa: ARG001 - a ParseBlock
    """The calls of an object, a list of objects, or objects one behind the other (parted by space , ; or none)."""
    stripped = text.strip()
    if stripped.startswith("["):
        try:
            items = _list_decoder.decode(stripped.encode())
        except _FAILURES:
            return None
        calls = [parse_json_call(bytes(item)) for item in items]
    else:
        single = parse_json_call(stripped)
        if single is not None:
            return [single]
        pieces = split_objects(stripped)
        if pieces is None:
            return None
        calls = [parse_json_call(piece) for piece in pieces]
    known = [call for call in calls if call is not None]
    return known if known and len(known) == len(calls) else None


def split_objects(text: str) -> list[str] | None:
    """The JSON objects of a text that holds nothing else but separators; None where it does."""
    decoder = json.JSONDecoder()
    pieces: list[str] = []
    position = 0
    while position < len(text):
        if text[position] in " \t\r\n,;":
            position += 1
            continue
        if text[position] != "{":
            return None
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return None
        pieces.append(text[position:end])
        position = end
    return pieces or None


def arguments_text(text: str) -> str | None:
    """The text of a JSON object, trimmed; "{}" for nothing; None where it is no object."""
    stripped = text.strip()
    return _object_text(stripped) if stripped else "{}"


def _object_text(text: str) -> str | None:
    try:
        if text.startswith('"'):  # some models write the object as text inside the object
            text = _text_decoder.decode(text.encode())
        _object_decoder.decode(text.encode())
    except _FAILURES:
        return None
    return text


def _is_text(raw: msgspec.Raw | None) -> bool:
    return raw is not None and bytes(raw).startswith(b'"')


def typed_value(text: str, schema: Any) -> Any:
    """A value that a format writes bare: text where the schema says so, else JSON where it is, else text."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return msgspec.json.decode(text.strip().encode())
    except _FAILURES:
        return text


def object_json(values: dict[str, Any]) -> str | None:
    """Arguments as JSON text; None where they cannot be."""
    try:
        return msgspec.json.encode(values).decode()
    except (TypeError, *_FAILURES):
        return None
