"""What is inside calls that are written as JSON: the keys that models give name and arguments, and their values."""

from __future__ import annotations

from typing import Any, Final

import msgspec

NAME_KEYS: Final = ("name", "tool_name", "function")
ARGUMENT_KEYS: Final = ("arguments", "parameters", "args")
ID_KEYS: Final = ("id", "tool_call_id")
_object_decoder = msgspec.json.Decoder(dict[str, object])
_text_decoder = msgspec.json.Decoder(str)
_FAILURES: Final = (msgspec.MsgspecError, ValueError, RecursionError)


def json_text(text: str) -> str | None:
    """The text that a JSON string holds; None for anything else."""
    try:
        return _text_decoder.decode(text.encode())
    except _FAILURES:
        return None


def object_text(text: str) -> str | None:
    """The text of a JSON object, which some models write as text inside the object; None where it is none."""
    try:
        if text.startswith('"'):
            text = _text_decoder.decode(text.encode()).strip()
        _object_decoder.decode(text.encode())
    except _FAILURES:
        return None
    return text


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
