"""From a raw body to a typed request, for every protocol: what is unknown or malformed is refused by name.

With --lenient, unknown fields are left out instead and named in the answer's warnings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec

from penstock.base.errors import ValidationError
from penstock.messages.bounds import MAX_JSON_DEPTH

_UNKNOWN: Final = re.compile(r"unknown field `(.*)`", re.DOTALL)
_MISSING: Final = re.compile(r"missing required field `(\w+)`")
_PATH: Final = re.compile(r" - at (?:`\$\.?(.+?)`|`key` in `\$\.?(.+?)`)$")
_STEP: Final = re.compile(r"\[(\d+)\]|([^.\[\]]+)")
MAX_QUOTED_CHARS: Final = 200  # of what a client sent, in an error
MAX_IGNORED_FIELDS: Final = 64  # more unknown fields than this are refused even with --lenient

T = TypeVar("T")


def decode_body(decoder: msgspec.json.Decoder[T], body: bytes, *, lenient: bool = False) -> tuple[T, list[str]]:
    """The request, and the names of unknown fields that were left out (none without `lenient`).

    Raises ValidationError naming the field.
    """
    try:
        request = decoder.decode(body)
    except msgspec.ValidationError as error:
        if lenient and _UNKNOWN.search(str(error)):
            return _decode_known(decoder, body)
        raise schema_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValidationError(
            f"The body is not valid JSON: {str(error)[:200]}.", remedy="NaN and Infinity are not JSON either."
        ) from None
    except (RecursionError, ValueError, OverflowError):
        raise ValidationError("The body nests too deeply, or holds a number that is too long.") from None
    # Only what can nest at all is worth the walk: brackets inside strings make it run, never fail.
    if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH:
        check_fields_depth(request)
    return request, []


def ignored_fields(names: Sequence[str]) -> list[dict[str, str]]:
    """What an answer's `warnings` say of fields that were left out."""
    return [{"code": "unknown_field", "message": f"{name} is not a known field: it was ignored."} for name in names]


def with_ignored(answer: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The answer, with `warnings` where fields were left out."""
    return {**answer, "warnings": ignored_fields(names)} if names else answer


def check_fields_depth(request: Any) -> None:
    """Raises ValidationError where a field nests too deeply."""
    for name in request.__struct_fields__:
        _check_depth(getattr(request, name), name)


def _decode_known(decoder: msgspec.json.Decoder[T], body: bytes) -> tuple[T, list[str]]:
    """Takes unknown fields out one by one, as the decoder names them."""
    value = msgspec.json.decode(body)
    _check_depth(value, "body")
    ignored: list[str] = []
    while len(ignored) < MAX_IGNORED_FIELDS:
        try:
            return decoder.decode(msgspec.json.encode(value)), ignored
        except msgspec.ValidationError as error:
            text = str(error)
            unknown = _UNKNOWN.search(_PATH.sub("", text))
            problem = schema_error(text)
            if unknown is None or not _remove(value, text, unknown[1]):
                raise problem from None
            ignored.append(problem.param or "")
    raise ValidationError(f"The body has more than {MAX_IGNORED_FIELDS} unknown fields.")


def _remove(value: Any, text: str, name: str) -> bool:
    """Removes field `name` of the object that the decoder's message `text` points at; whether it was there."""
    match = _PATH.search(text)
    path = (match[1] or match[2]) if match else ""
    for index, key in _STEP.findall(path):
        try:
            value = value[int(index)] if index else value[key]
        except (KeyError, IndexError, TypeError):
            return False
    return isinstance(value, dict) and value.pop(name, _ABSENT) is not _ABSENT


_ABSENT: Final = object()


def schema_error(text: str) -> ValidationError:
    """msgspec's message with the field's path as `param`."""
    path = (match[1] or match[2]) if (match := _PATH.search(text)) else ""
    reason = _PATH.sub("", text)
    if match := _MISSING.search(reason) or _UNKNOWN.search(reason):
        name = match[1][:MAX_QUOTED_CHARS]
        path = f"{path}.{name}" if path else name
        if "missing required" in reason:
            return ValidationError(f"{path} is required.", param=path)
        return ValidationError(
            f"{path or 'the empty name'} is not a known field.",
            remedy="Leave it out: nothing that was asked for is ignored.",
            param=path,
        )
    if path.endswith("].type") and "content" in path:
        return ValidationError(f"{path}: only content parts of type text are supported.", param=path)
    return ValidationError(f"{path or 'body'}: {reason[:MAX_QUOTED_CHARS]}.", param=path or None)


def _check_depth(value: object, param: str) -> None:
    """Raises ValidationError where lists and objects nest deeper than MAX_JSON_DEPTH. Not recursive."""
    level: list[object] = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner += [child for child in item.values() if isinstance(child, (dict, list))]
            elif isinstance(item, list):
                inner += [child for child in item if isinstance(child, (dict, list))]
        if not inner:
            return
        level = inner
    raise ValidationError(f"{param} nests deeper than {MAX_JSON_DEPTH} levels.", param=param)
