"""Which schemas are taken, and that what is refused is named."""

from __future__ import annotations

import pytest

from penstock.structured.backend import GrammarError
from penstock.structured.json_schema import ANNOTATIONS, ENFORCED, WHITESPACE, enforceable, parse_schema

NOT_ENFORCED = (
    "contains", "dependencies", "dependentRequired", "dependentSchemas", "else", "if", "maxContains", "minContains",
    "not", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties", "uniqueItems", "minLenght", "nullable",
    "$dynamicRef",
)  # fmt: skip


@pytest.mark.parametrize("keyword", NOT_ENFORCED)
@pytest.mark.parametrize("nest", [
    lambda schema: schema,
    lambda schema: {"type": "object", "properties": {"a": {"type": "array", "items": schema}}},
    lambda schema: {"anyOf": [{"type": "null"}, {"prefixItems": [True, schema]}]},
    lambda schema: {"$defs": {"x": {"additionalProperties": schema}}, "$ref": "#/$defs/x"},
    lambda schema: {"items": [schema], "additionalItems": False},
    lambda schema: {"patternProperties": {"^a": {"oneOf": [schema]}}},
])  # fmt: skip
def test_a_keyword_that_cannot_be_enforced_is_named_wherever_it_stands(keyword: str, nest: object) -> None:
    with pytest.raises(GrammarError, match=f"'{keyword.replace('$', '.')}'"):
        enforceable(nest({"type": "string", keyword: {"const": 1}}))  # type: ignore[operator]


def test_properties_may_have_the_names_of_keywords() -> None:
    schema = {"type": "object", "properties": {"not": {"type": "string"}, "contains": True}}
    assert enforceable(schema)["properties"] == schema["properties"]


def test_what_excludes_nothing_passes() -> None:
    schema = {"title": "T", "x-order": 3, "uniqueItems": False, "items": {"description": "d", "deprecated": True}}
    checked = enforceable(schema)
    assert checked.pop("x-guidance") == {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
    assert checked == {"title": "T", "x-order": 3, "items": {"description": "d", "deprecated": True}}
    assert not ENFORCED & ANNOTATIONS


@pytest.mark.parametrize(("schema", "message"), [
    ({"x-guidance": {"lenient": True}}, "x-guidance"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"type": "string", "minLength": -1}, "minLength"),
    ({"type": "array", "maxItems": 10**9}, "maxItems"),
    ({"type": "string", "pattern": "(a{999}){999}"}, "pattern"),
    ({"properties": []}, "properties"),
    ({"anyOf": {}}, "anyOf"),
    ({"items": 3}, "items"),
    ({"items": [3]}, "object or a boolean"),
    (False, "must be an object"),
    ([], "must be an object"),
])  # fmt: skip
def test_malformed_and_boundless_schemas_are_refused(schema: object, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        enforceable(schema)


def test_what_the_library_would_give_up_on_is_refused_at_once_by_name() -> None:
    names = {f"k{index}": True for index in range(1200)}
    assert enforceable({"type": "object", "properties": names, "required": list(names)[::2]})["properties"] == names
    with pytest.raises(GrammarError, match="1199 names in a row"):
        enforceable({"type": "object", "properties": names, "required": ["k0"]})
    for divisor in (100, 7, 10**9, 3 * 2**40, 2.5, 733_103.5, 0):
        assert enforceable({"type": "number", "multipleOf": divisor})["multipleOf"] == divisor
    with pytest.raises(GrammarError, match="'multipleOf' of more than 100000"):
        enforceable({"anyOf": [{"type": "integer", "multipleOf": 733_103}]})


def test_a_required_list_makes_min_properties_enforceable() -> None:
    assert enforceable({"type": "object", "required": ["a", "b"], "minProperties": 2})["minProperties"] == 2


def test_text_that_is_no_json_is_refused() -> None:
    for text in ("{", "", "[" * 100_000, "{'a': 1}"):
        with pytest.raises(GrammarError, match="JSON"):
            parse_schema(text)
