"""Which JSON schemas can be enforced. What cannot is refused by name; nothing is ever ignored.

The library refuses what it knows and lacks, but passes over names that it does not know, as the standard lets it. A
client that misspells `minLength` or uses a keyword of another draft is told so here instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, Final

from penstock.structured.backend import GrammarError
from penstock.structured.regex_size import check_regex_size

ENFORCED: Final = frozenset((
    "$ref", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "enum", "exclusiveMaximum",
    "exclusiveMinimum", "format", "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems", "minLength",
    "minProperties", "minimum", "multipleOf", "oneOf", "pattern", "patternProperties", "prefixItems", "properties",
    "required", "type",
))  # fmt: skip

# They say something about a value, but exclude none.
ANNOTATIONS: Final = frozenset((
    "$anchor", "$comment", "$defs", "$id", "$schema", "contentEncoding", "contentMediaType", "default", "definitions",
    "deprecated", "description", "discriminator", "example", "examples", "id", "readOnly", "title", "writeOnly",
))  # fmt: skip

# Values of keywords beyond these that exclude nothing.
_NO_OP_VALUES: Final[Mapping[str, Any]] = {
    "uniqueItems": False,
    "not": False,
    "dependentRequired": {},
    "minContains": 0,
}

# Keywords that hold schemas, and in what: a list, a map, or bare (a schema is an object or a boolean).
_SUBSCHEMA_MAPS: Final = ("$defs", "definitions", "patternProperties", "properties")
_SUBSCHEMAS: Final[Mapping[str, tuple[type, ...]]] = {
    **dict.fromkeys(_SUBSCHEMA_MAPS, (dict,)),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), (list,)),
    **dict.fromkeys(("additionalItems", "additionalProperties"), (dict, bool)),
    "items": (dict, bool, list),
}

# A length beyond this fits no context.
MAX_LENGTH: Final = 1_000_000
# Beyond these the library always gives up, after a long time or with words that name nothing. A divisor has a state for
# each remainder; factors of ten show in the last digits and cost little.
MAX_DIVISOR: Final = 100_000
# Each of a row of names that may all be left out takes four of the library's items, of which a row may have 2,000.
MAX_OPTIONAL_IN_A_ROW: Final = 498
# Where JSON lets white space stand: a line break with indentation, or some blanks, once. A model that has lost its way
# would fill its budget with it otherwise.
WHITESPACE: Final = r"(\r?\n[ \t]{0,40}|[ \t]{1,4})"


def parse_schema(text: str) -> Any:
    """Raises GrammarError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not valid JSON: {error}") from None


def enforceable(schema: Any, where: str = "schema") -> dict[str, Any]:
    """The schema without what excludes nothing, and with our white space.

    where: what to call it in an error. Raises GrammarError naming the keyword.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError(f"{where} must be an object")
    checked: dict[str, Any] = _checked(schema, where)
    if "x-guidance" in schema:
        raise GrammarError("x-guidance is not supported")
    return {**checked, "x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}}


def _checked(schema: Any, path: str) -> Any:
    """A schema and all inside it. Recursion is bounded by the parser's own."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise GrammarError(f"{path} must be an object or a boolean")
    kept = {key: value for key, value in schema.items() if key not in _NO_OP_VALUES or value != _NO_OP_VALUES[key]}
    for key, value in kept.items():
        if key not in ENFORCED and key not in ANNOTATIONS and not key.startswith("x-"):
            raise GrammarError(f"{path}: {key!r} cannot be enforced", remedy="Leave it out, or check the result.")
        _check_value(key, value, path)
    _check_counts(kept, path)
    _check_optional(kept, path)
    for key, inner_path in _with_subschemas(kept, path):
        if key in _SUBSCHEMA_MAPS:
            kept[key] = {name: _checked(inner, f"{inner_path}[{name!r}]") for name, inner in kept[key].items()}
        elif isinstance(kept[key], list):
            kept[key] = [_checked(inner, f"{inner_path}[{index}]") for index, inner in enumerate(kept[key])]
        else:
            kept[key] = _checked(kept[key], inner_path)
    return kept


def _with_subschemas(schema: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """(keyword, its path) of the keywords that hold schemas."""
    for key, kinds in _SUBSCHEMAS.items():
        if key in schema:
            if not isinstance(schema[key], kinds):
                raise GrammarError(f"{path}.{key} does not hold what it should")
            yield key, f"{path}.{key}"


def _check_value(key: str, value: Any, path: str) -> None:
    if key in ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties") and not (
        isinstance(value, int) and 0 <= value <= MAX_LENGTH
    ):
        raise GrammarError(f"{path}.{key} must be a whole number from 0 to {MAX_LENGTH}")
    if key == "multipleOf" and isinstance(value, int) and _without_tens(value) > MAX_DIVISOR:
        raise GrammarError(
            f"{path}: 'multipleOf' of more than {MAX_DIVISOR}, factors of 2 and 5 aside, cannot be enforced",
            remedy="Leave it out, or check the result.",
        )
    if key == "pattern" and isinstance(value, str):
        check_regex_size(value, f"{path}.pattern")
    if key == "patternProperties" and isinstance(value, dict):
        for pattern in value:
            check_regex_size(pattern, f"{path}.patternProperties")


def _check_counts(schema: dict[str, Any], path: str) -> None:
    """Names that are not listed may come twice in generated JSON, and count once when it is read."""
    required = schema.get("required")
    num_required = len(set(map(str, required))) if isinstance(required, list) else 0
    if schema.get("minProperties", 0) > max(1, num_required):
        raise GrammarError(
            f"{path}: 'minProperties' above the number of required properties cannot be enforced",
            remedy="Name the properties in `required`.",
        )


def _check_optional(schema: dict[str, Any], path: str) -> None:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or len(properties) <= MAX_OPTIONAL_IN_A_ROW:
        return
    names = set(map(str, required)) if isinstance(required, list) else set()
    longest = max(
        (len(list(run)) for is_required, run in groupby(properties, names.__contains__) if not is_required), default=0
    )
    if longest > MAX_OPTIONAL_IN_A_ROW:
        raise GrammarError(
            f"{path}.properties: {longest} names in a row that may be left out are more than {MAX_OPTIONAL_IN_A_ROW}",
            remedy="Name some of them in `required`.",
        )


def _without_tens(number: int) -> int:
    for factor in (2, 5):
        while number and number % factor == 0:
            number //= factor
    return abs(number)
