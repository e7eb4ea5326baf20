"""Schemas, regular expressions and grammars made to burn time or memory, or to break a parser."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from penstock.messages import GrammarKind, GrammarSpec


def hostile_specs(seed: int = 0) -> Iterator[GrammarSpec]:
    """Endless; every one is different."""
    chance = random.Random(seed)
    while True:
        yield chance.choice(_MAKERS)(chance)


def slow_schema(first: int = 50_000) -> GrammarSpec:
    """Takes seconds to compile: divisors that are each allowed, with a state for every remainder of each."""
    items = [{"type": "integer", "multipleOf": first + 7 * index} for index in range(1, 30)]
    items = [item for item in items if item["multipleOf"] % 2 and item["multipleOf"] % 5]
    return GrammarSpec.json_schema({"type": "array", "prefixItems": items, "minItems": len(items), "items": False})


def _divisors(chance: random.Random) -> GrammarSpec:
    return slow_schema(chance.randint(20_000, 90_000))


def _nested_counts(chance: random.Random) -> GrammarSpec:
    pattern = chance.choice("abc")
    for _ in range(chance.randint(4, 6)):
        pattern = f"({pattern}{{{chance.randint(20, 60)}}})"
    return GrammarSpec.regex(pattern)


def _huge_count(chance: random.Random) -> GrammarSpec:
    return GrammarSpec.regex(f"[a-z]{{{chance.randint(10**5, 10**9)}}}")


def _open_group(chance: random.Random) -> GrammarSpec:
    return GrammarSpec.regex("(" * chance.randint(1, 5000) + "a")


def _deep_groups(chance: random.Random) -> GrammarSpec:
    depth = chance.randint(1000, 50_000)
    return GrammarSpec.regex("(" * depth + "a" + ")" * depth)


def _unsupported(chance: random.Random) -> GrammarSpec:
    return GrammarSpec.regex(chance.choice([r"(?=a{%d})b", r"(a{%d})\1", r"(?<!x{%d})y"]) % chance.randint(1, 99))


def _counted_pattern(chance: random.Random) -> GrammarSpec:
    pattern = f"((a|b){{{chance.randint(300, 900)}}}c){{{chance.randint(300, 900)}}}"
    return GrammarSpec.json_schema({"type": "object", "properties": {"x": {"type": "string", "pattern": pattern}}})


def _multiple(chance: random.Random) -> GrammarSpec:
    return GrammarSpec.json_schema(
        {"type": "integer", "multipleOf": chance.choice([733_103, 999_983, 1_299_709]) * chance.randint(2, 99)}
    )


def _all_of_product(chance: random.Random) -> GrammarSpec:
    def one(index: int) -> dict[str, Any]:
        properties = {f"p{i}": {"type": "string", "pattern": f"a{index}.*{i}"} for i in range(5)}
        return {"type": "object", "properties": properties}

    width = chance.randint(5, 8)
    return GrammarSpec.json_schema({"allOf": [{"anyOf": [one(i * j) for i in range(width)]} for j in range(width)]})


def _many_properties(chance: random.Random) -> GrammarSpec:
    names = range(chance.randint(5000, 12_000))
    return GrammarSpec.json_schema({"type": "object", "properties": {f"k{i}": {"type": "string"} for i in names}})


def _alternating_properties(chance: random.Random) -> GrammarSpec:
    names = [f"k{i}" for i in range(chance.randint(5000, 12_000))]
    properties = {name: {"type": "string"} for name in names}
    return GrammarSpec.json_schema({"type": "object", "properties": properties, "required": names[::2]})


def _many_patterns(chance: random.Random) -> GrammarSpec:
    names = range(chance.randint(1000, 2000))
    properties = {f"k{i}": {"type": "string", "pattern": f"^x{i}[a-z]*{i}$"} for i in names}
    return GrammarSpec.json_schema({"type": "object", "properties": properties})


def _circular(chance: random.Random) -> GrammarSpec:
    names = [f"n{i}" for i in range(chance.randint(2, 9))]
    definitions = {name: {"$ref": f"#/$defs/{names[i - 1]}"} for i, name in enumerate(names)}
    return GrammarSpec.json_schema({"$defs": definitions, "$ref": "#/$defs/n0"})


def _deep_schema(chance: random.Random) -> GrammarSpec:
    depth = chance.randint(2000, 20_000)
    return GrammarSpec(GrammarKind.JSON_SCHEMA, '{"items":' * depth + "{}" + "}" * depth)


def _endless(chance: random.Random) -> GrammarSpec:
    names = [f"r{i}" for i in range(chance.randint(2, 300))]
    rules = [f'{name}: {names[i - 1]} "x" | {names[i - 1]}' for i, name in enumerate(names)]
    return GrammarSpec.grammar("\n".join(["start: r0", *rules]) + "\n")


def _intersections(chance: random.Random) -> GrammarSpec:
    counts = [chance.randint(25, 60) for _ in range(3)]
    return GrammarSpec.grammar(f"start: A\nA: /.*a.{{{counts[0]}}}/ & /.*b.{{{counts[1]}}}/ & ~/.*c.{{{counts[2]}}}/\n")


def _circular_terminals(chance: random.Random) -> GrammarSpec:
    count = chance.randint(2, 50)
    lines = ["start: T0", *(f"T{i}: T{(i + 1) % count} /[a-z]/" for i in range(count))]
    return GrammarSpec.grammar("\n".join(lines) + "\n")


def _bad_keyword(chance: random.Random) -> GrammarSpec:
    keyword = chance.choice(["uniqueItems", "contains", "propertyNames", "if", "dependentRequired", "minLenght"])
    return GrammarSpec.json_schema({"type": "array", keyword: {"const": chance.randint(0, 10**9)}})


def _impossible(chance: random.Random) -> GrammarSpec:
    low = chance.randint(1, 10**6)
    return GrammarSpec.json_schema({"type": "integer", "minimum": low, "maximum": low - 1})


_MAKERS = (
    _nested_counts, _huge_count, _open_group, _deep_groups, _unsupported, _counted_pattern,
    _multiple, _all_of_product, _many_properties, _many_patterns, _circular, _deep_schema, _endless, _intersections,
    _circular_terminals, _bad_keyword, _impossible, _divisors, _alternating_properties,
)  # fmt: skip
