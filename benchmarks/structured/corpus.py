"""Schemas, regular expressions, choices and grammars of our own making, each with an independent judge of its outputs.

Everything is drawn from a seed. A case that the library cannot enforce is refused when it is made; that is counted,
not failed.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema
import lark

from penstock.messages import GrammarSpec


@dataclass(frozen=True)
class Case:
    """judge: raises, or returns False, when a text does not obey."""

    kind: str
    spec: GrammarSpec
    judge: Callable[[str], bool]

    def is_valid(self, text: str) -> bool:
        try:
            return self.judge(text)
        except Exception:
            return False


def cases(seed: int = 0) -> Iterator[Case]:
    """Endless, varied: six of ten are JSON schemas."""
    chance = random.Random(seed)
    makers = [_schema_case] * 6 + [_regex_case, _regex_case, _choice_case, _grammar_case]
    while True:
        yield chance.choice(makers)(chance)


# ---- JSON schemas


def schema_case(schema: Any) -> Case:
    validator = jsonschema.Draft202012Validator(schema)

    def judge(text: str) -> bool:
        validator.validate(json.loads(text))
        return True

    return Case("json_schema", GrammarSpec.json_schema(schema), judge)


def _schema_case(chance: random.Random) -> Case:
    return schema_case(_schema(chance, chance.randint(0, 3)))


def _schema(chance: random.Random, depth: int) -> dict[str, Any]:
    makers = [_string, _string, _integer, _number, _enum, _const, _boolean]
    if depth:
        makers += [_object, _object, _object, _array, _array, _any_of, _all_of, _reference]
    schema = chance.choice(makers)(chance, depth)
    if chance.random() < 0.2:
        schema = {"title": _word(chance), "description": "of " + _word(chance), **schema}
    return schema


def _word(chance: random.Random) -> str:
    return "".join(chance.choices(string.ascii_lowercase, k=chance.randint(1, 9)))


def _text(chance: random.Random) -> str:
    return "".join(chance.choices(string.ascii_letters + ' _-é"\\/\n日😀', k=chance.randint(1, 8)))


def _string(chance: random.Random, _: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    roll = chance.random()
    if roll < 0.3:
        schema["minLength"] = chance.randint(0, 5)
        schema["maxLength"] = schema["minLength"] + chance.randint(0, 10)
    elif roll < 0.5:
        schema["pattern"] = f"^{_regex(chance, 2)}$"
    elif roll < 0.6:
        schema["pattern"] = _regex(chance, 1)
        schema["maxLength"] = 30
    elif roll < 0.75:
        schema["format"] = chance.choice(["date", "time", "date-time", "uuid", "ipv4", "email", "hostname"])
    elif roll < 0.95:
        schema["maxLength"] = chance.randint(1, 20)
    return schema


def _integer(chance: random.Random, _: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    low = chance.randint(-1000, 1000)
    if chance.random() < 0.6:
        schema[chance.choice(["minimum", "exclusiveMinimum"])] = low
    if chance.random() < 0.6:
        schema[chance.choice(["maximum", "exclusiveMaximum"])] = low + chance.randint(3, 10**6)
    if chance.random() < 0.2:
        schema["multipleOf"] = chance.choice([2, 3, 5, 7, 10])
    return schema


def _number(chance: random.Random, _: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "number"}
    if chance.random() < 0.5:
        low = chance.randint(-400, 400) / 4
        schema |= {"minimum": low, "maximum": low + chance.randint(1, 4000) / 4}
    return schema


def _enum(chance: random.Random, _: int) -> dict[str, Any]:
    values: list[Any] = [_text(chance) for _ in range(chance.randint(1, 12))]
    if chance.random() < 0.3:
        values += [None, True, chance.randint(-9, 99), 1.5, [1, "a"], {"k": None}]
    return {"enum": values}


def _const(chance: random.Random, _: int) -> dict[str, Any]:
    return {"const": chance.choice([_text(chance), 7, None, False, [1, 2], {"a": _word(chance)}])}


def _boolean(chance: random.Random, _: int) -> dict[str, Any]:
    return {"type": chance.choice(["boolean", "null", ["boolean", "null"], ["string", "null"], ["integer", "boolean"]])}


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = list(dict.fromkeys(chance.choice([_word, _text])(chance) for _ in range(chance.randint(1, 5))))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(chance, depth - 1) for name in names},
        "required": [name for name in names if chance.random() < 0.6],
    }
    roll = chance.random()
    if roll < 0.6:
        schema["additionalProperties"] = False
    elif roll < 0.75:
        schema["additionalProperties"] = _schema(chance, 0)
    elif roll < 0.85:
        del schema["properties"], schema["required"]
        schema["patternProperties"] = {"^[a-c]{1,3}$": _schema(chance, 0)}
        schema["additionalProperties"] = False
    return schema


def _array(chance: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    if chance.random() < 0.3:
        schema["prefixItems"] = [_schema(chance, depth - 1) for _ in range(chance.randint(1, 3))]
        schema["items"] = chance.choice([False, _schema(chance, 0)])
    else:
        schema["items"] = _schema(chance, depth - 1)
        if chance.random() < 0.7:
            schema["minItems"] = chance.randint(0, 2)
            schema["maxItems"] = schema["minItems"] + chance.randint(0, 3)
    return schema


def _any_of(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(chance, depth - 1) for _ in range(chance.randint(1, 3))]}


def _all_of(chance: random.Random, depth: int) -> dict[str, Any]:
    names = [_word(chance) + str(index) for index in range(2)]
    return {
        "allOf": [
            {"type": "object", "properties": {name: _schema(chance, depth - 1)}, "required": [name]} for name in names
        ]
    }


def _reference(chance: random.Random, depth: int) -> dict[str, Any]:
    if chance.random() < 0.5:
        return {
            "$defs": {"node": {"type": "object", "properties": {
                "value": _schema(chance, 0), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["value", "next"], "additionalProperties": False}},
            "$ref": "#/$defs/node",
        } if depth == 3 else _object(chance, depth)  # fmt: skip
    return _object(chance, depth)


# ---- regular expressions


def _regex_case(chance: random.Random) -> Case:
    pattern = _regex(chance, 3)
    compiled = re.compile(pattern)
    return Case("regex", GrammarSpec.regex(pattern), lambda text: compiled.fullmatch(text) is not None)


def _regex(chance: random.Random, depth: int) -> str:
    if depth == 0:
        return chance.choice(
            ["[a-z]", "[0-9]", "[A-F0-9]", '[^\\n"\\\\]', "x", "foo", "-", "\\.", "[a-zA-Z_]", "@", " ", "é", "/"]
        )
    parts = []
    for _ in range(chance.randint(1, 3)):
        part = _regex(chance, depth - 1)
        roll = chance.random()
        if roll < 0.2:
            part = f"(?:{part}|{_regex(chance, depth - 1)})"
        elif roll < 0.5:
            part = f"(?:{part}){chance.choice(['?', '{2}', '{1,3}', '{0,4}', '+', '*'])}"
        parts.append(part)
    return "".join(parts)


# ---- choices and grammars


def _choice_case(chance: random.Random) -> Case:
    choices = [_text(chance) for _ in range(chance.randint(1, 20))]
    return Case("choice", GrammarSpec.choice(choices), choices.__contains__)


_GRAMMARS = (
    'start: sum\nsum: product ("+" product | "-" product)*\nproduct: atom ("*" atom)*\natom: NUMBER | "(" sum ")"\n'
    "NUMBER: /[0-9]{1,N}/\n",
    'start: item ("," item)*\nitem: NAME "=" VALUE\nNAME: /[a-z]{1,N}/\nVALUE: /[0-9]{1,3}|"[a-z]*"/\n',
    'start: "<a>" start "</a>" | WORD\nWORD: /[a-z]{N}/\n',
    'start: "if " COND " then " BODY (" else " BODY)?\nCOND: /[a-z]{1,N} == [0-9]/\nBODY: /[a-z]{1,N}\\(\\)/\n',
    'start: "[" (value ("," value)*)? "]"\nvalue: "t" | "f" | start | N1\nN1: /[1-9][0-9]{0,N}/\n',
)


def _grammar_case(chance: random.Random) -> Case:
    text = chance.choice(_GRAMMARS).replace(",N}", f",{chance.randint(1, 6)}}}").replace("{N}", "{3}")
    parser = lark.Lark(text, parser="earley")

    def judge(output: str) -> bool:
        parser.parse(output)
        return True

    return Case("grammar", GrammarSpec.grammar(text), judge)
