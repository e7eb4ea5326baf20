"""The arguments of a call in the styles that are not JSON: between tags, as Python's keywords, with Gemma's quotes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from penstock.messages import CallForm, CallStyle
from penstock.structured.backend import GrammarError
from penstock.structured.json_schema import ANNOTATIONS, enforceable
from penstock.structured.lark import LarkGrammar, alternatives

_OBJECT_KEYS: Final = frozenset(("type", "properties", "required", "additionalProperties"))
_LIST_KEYS: Final = frozenset(("type", "items", "minItems", "maxItems"))
_KEY: Final = re.compile(r"[A-Za-z_]\w*")
_FREE_KEY: Final = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"
_STRING: Final[dict[str, Any]] = {"type": "string"}
# What JSON and Python mean the same by.
_COMMON_ESCAPES: Final = '"\\nrt'
_DEFINITIONS: Final = ("$defs", "definitions")
MAX_LISTED: Final = 64
MAX_DEPTH: Final = 16

WriteMember = Callable[[str | None, Any], str]  # (the key, None for any; the schema of the value) -> what it looks like


def add_arguments(grammar: LarkGrammar, form: CallForm, parameters: Mapping[str, Any] | None, where: str) -> str:
    """The rule of all arguments. Raises GrammarError naming what cannot be enforced in this style."""
    schema = {} if parameters is None else enforceable(dict(parameters), where)
    schema.pop("x-guidance", None)
    return _WRITERS[form.style](grammar, form, schema, where)


def _tagged(grammar: LarkGrammar, form: CallForm, schema: Mapping[str, Any], where: str) -> str:
    def member(key: str | None, value: Any) -> str:
        before = f"{grammar.literal(form.before_key)} {_FREE_KEY if key is None else grammar.literal(key)}"
        if value is None or (isinstance(value, dict) and value.get("type") == "string"):
            text = grammar.bare_text(form.after_value, value or _STRING, form.not_in_text, f"{where}.{key}")
            return f"{before} {grammar.literal(form.before_text)} {text}"
        inner = grammar.schema(_with_definitions(value, schema), f"{where}.{key}")
        return f"{before} {grammar.literal(form.before_json)} {inner} {grammar.literal(form.after_value)}"

    return _Members(grammar, member, "").add(schema, where)


def _python(grammar: LarkGrammar, _form: CallForm, schema: Mapping[str, Any], where: str) -> str:
    def member(key: str | None, value: Any) -> str:
        name = _FREE_KEY if key is None else grammar.literal(key)
        if isinstance(value, dict) and value.get("type") == "boolean" and value.keys() <= {"type"} | ANNOTATIONS:
            return f'{name} "=" ("True" | "False")'
        value = _with_definitions({} if value is None else value, schema)
        return f'{name} "=" {grammar.schema(value, f"{where}.{key}", escapes=_COMMON_ESCAPES)}'

    return _Members(grammar, member, ", ").add(schema, where)


def _gemma(grammar: LarkGrammar, form: CallForm, schema: Mapping[str, Any], where: str) -> str:
    return _Gemma(grammar, form.quote, schema).value({"type": "object", **schema}, where, 0)


_WRITERS: Final[Mapping[CallStyle, Callable[[LarkGrammar, CallForm, Mapping[str, Any], str], str]]] = {
    CallStyle.TAGGED: _tagged,
    CallStyle.PYTHON: _python,
    CallStyle.GEMMA: _gemma,
}


@dataclass(frozen=True)
class _Members:
    """The members of an object, in the order of its `properties`, with a separator between them.

    Where no properties are listed and further ones are not excluded, any come in any number.
    """

    grammar: LarkGrammar
    write: WriteMember
    separator: str

    def add(self, schema: Mapping[str, Any], where: str) -> str:
        for key in schema:
            if key not in _OBJECT_KEYS and key not in ANNOTATIONS and not key.startswith("x-"):
                raise GrammarError(f"{where}: {key!r} cannot be enforced in the form in which this model writes calls")
        properties: dict[str, Any] = dict(schema.get("properties", {}))
        required = [str(name) for name in schema.get("required", ())]
        properties |= {name: {} for name in required if name not in properties}
        for name in properties:
            if not _KEY.fullmatch(name):
                raise GrammarError(f"{where}: {name[:100]!r} cannot be the name of an argument in this model's form")
        separator = self.grammar.literal(self.separator)
        if not properties:
            further = schema.get("additionalProperties", True)
            if further is False:
                return self.grammar.rule('""')
            one = self.grammar.rule(self.write(None, None if further is True else further))
            return self.grammar.rule(f"({one} ({separator} {one})*)?")
        rest = begun = ""
        for name, value in reversed(properties.items()):
            one = self.grammar.rule(self.write(name, {} if value is True else value))
            # rest: the members from here on where none stands before; begun: where one does, and with a separator.
            if name in required:
                rest, begun = f"{one} {begun}", f"{separator} {one} {begun}"
            else:
                rest = f"({one} {begun} | {rest})" if rest else f"({one} {begun})?"
                begun = f"({separator} {one})? {begun}"
            rest, begun = self.grammar.rule(rest), self.grammar.rule(begun)
        return rest


@dataclass(frozen=True)
class _Gemma:
    """Values with bare keys and text between `quote` and `quote`."""

    grammar: LarkGrammar
    quote: str
    root: Mapping[str, Any]

    def value(self, schema: Any, where: str, depth: int) -> str:
        if depth > MAX_DEPTH:
            raise GrammarError(f"{where}: it nests deeper than {MAX_DEPTH} levels")
        if schema is True or (isinstance(schema, dict) and not schema.keys() - ANNOTATIONS):
            return self._alternatives(
                [{"type": kind} for kind in ("string", "number", "boolean", "null")], where, depth
            )
        if not isinstance(schema, dict):
            raise GrammarError(f"{where}: it excludes everything")
        kind = schema.get("type")
        if isinstance(kind, list):
            return self._alternatives([{**schema, "type": one} for one in kind], where, depth)
        if "anyOf" in schema and schema.keys() <= {"anyOf"} | ANNOTATIONS:
            return self._alternatives(schema["anyOf"], where, depth)
        if kind == "object":
            return self._object(schema, where, depth)
        if kind == "array":
            return self._list(schema, where, depth)
        if kind == "string" or (kind is None and all(isinstance(one, str) for one in schema.get("enum", [None]))):
            text = self.grammar.bare_text(self.quote, {"type": "string", **schema}, ("<escape>", '<|"|>'), where)
            return self.grammar.rule(f"{self.grammar.literal(self.quote)} {text}")
        if kind in ("integer", "number", "boolean", "null"):
            return self.grammar.schema(schema, where)
        raise GrammarError(f"{where}: a schema without a type cannot be enforced in this model's form")

    def _alternatives(self, schemas: Sequence[Any], where: str, depth: int) -> str:
        return self.grammar.rule(alternatives(self.value(one, where, depth + 1) for one in schemas))

    def _object(self, schema: Mapping[str, Any], where: str, depth: int) -> str:
        def member(key: str | None, value: Any) -> str:
            name = _FREE_KEY if key is None else self.grammar.literal(key)
            return f'{name} ":" {self.value(True if value is None else value, f"{where}.{key}", depth + 1)}'

        return self.grammar.rule(f'"{{" {_Members(self.grammar, member, ",").add(schema, where)} "}}"')

    def _list(self, schema: Mapping[str, Any], where: str, depth: int) -> str:
        for key in schema:
            if key not in _LIST_KEYS and key not in ANNOTATIONS:
                raise GrammarError(f"{where}: {key!r} cannot be enforced in this model's form")
        one = self.value(schema.get("items", True), f"{where}[]", depth + 1)
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        if max(low, high or 0) > MAX_LISTED:
            raise GrammarError(f"{where}: more than {MAX_LISTED} items cannot be counted in this model's form")
        if high == 0:
            return self.grammar.rule('"[" "]"')
        further = f'("," {one}){{{max(low - 1, 0)},{"" if high is None else high - 1}}}'
        items = f"{one} {further}"
        return self.grammar.rule(f'"[" {items if low else f"({items})?"} "]"')


def _with_definitions(value: Any, schema: Mapping[str, Any]) -> Any:
    """The schema of one argument with the definitions that its references name."""
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    return {**definitions, **value} if isinstance(value, dict) and "$ref" in json.dumps(value) else value
