"""Schemas of strings as they apply to text that stands bare, without quotes and escapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from penstock.structured.backend import GrammarError
from penstock.structured.json_schema import ANNOTATIONS
from penstock.structured.regex_size import check_regex_size

_ENFORCED: Final = frozenset(("type", "enum", "const", "minLength", "maxLength", "pattern"))


def string_values(schema: Mapping[str, Any], where: str) -> list[str]:
    """The texts that `enum` or `const` leaves; empty where there are neither. Raises GrammarError."""
    if "enum" not in schema and "const" not in schema:
        return []
    values = schema.get("enum", [schema.get("const")])
    texts = [value for value in values if isinstance(value, str) and schema.get("const", value) == value]
    if not texts or len(schema.keys() & _ENFORCED) > 3:
        raise GrammarError(f"{where}: no text satisfies it")
    if schema.keys() & {"minLength", "maxLength", "pattern"}:
        raise GrammarError(f"{where}: 'enum' and 'const' take no further keywords in bare text")
    return texts


def text_patterns(schema: Mapping[str, Any], where: str) -> list[str]:
    """Regular expressions, all of which the text matches as a whole. Raises GrammarError naming a keyword."""
    for key in schema:
        if key not in _ENFORCED and key not in ANNOTATIONS and not key.startswith("x-"):
            raise GrammarError(f"{where}: {key!r} cannot be enforced where this model writes text without quotes")
    patterns: list[str] = []
    if "minLength" in schema or "maxLength" in schema:
        low, high = schema.get("minLength", 0), schema.get("maxLength", "")
        patterns.append(f"(?s:.{{{low},{high}}})")
        check_regex_size(patterns[0], f"{where}.maxLength")
    if isinstance(pattern := schema.get("pattern"), str):
        check_regex_size(pattern, f"{where}.pattern")
        patterns.append(_whole(pattern))
    return patterns or ["(?s:.*)"]


def _whole(pattern: str) -> str:
    """A pattern that may match anywhere, as one of the whole text."""
    begin, end = "(?s:.*)", "(?s:.*)"
    if pattern.startswith("^"):
        begin, pattern = "", pattern[1:]
    if pattern.endswith("$") and not pattern.endswith("\\$"):
        end, pattern = "", pattern[:-1]
    return f"{begin}(?:{pattern.replace('/', chr(92) + '/')}){end}"
