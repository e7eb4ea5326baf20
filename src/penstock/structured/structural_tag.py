"""Structural tags: free text with parts that obey a schema, in the forms that vLLM and xgrammar take.

Two forms. The older one: {"structures": [{"begin", "schema", "end"}], "triggers": [...]}. The newer one:
{"type": "structural_tag", "format": F} where F is an object with one of the types of `_FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from penstock.structured.backend import GrammarError
from penstock.structured.lark import LarkGrammar, alternatives
from penstock.structured.regex_size import check_regex_size

MAX_NESTING: Final = 32


def add_structural_tag(grammar: LarkGrammar, tag: Any) -> str:
    """The rule of a whole structural tag. Raises GrammarError naming what is wrong or not known."""
    if not isinstance(tag, dict):
        raise GrammarError("a structural tag must be an object")
    if tag.get("type", "structural_tag") != "structural_tag":
        raise GrammarError("the type of a structural tag must be 'structural_tag'")
    if "format" in tag:
        _only(tag, "structural_tag", required=("format",), optional=("type",))
        return _format(grammar, tag["format"], 0)
    _only(tag, "structural_tag", required=("structures", "triggers"), optional=("type",))
    tags = [
        {"begin": one["begin"], "content": {"type": "json_schema", "json_schema": one["schema"]}, "end": one["end"]}
        for one in _list_of_objects(tag["structures"], "structures", ("begin", "schema", "end"))
    ]
    return _triggered(grammar, {"triggers": tag["triggers"], "tags": tags}, 0)


def _format(grammar: LarkGrammar, value: Any, depth: int) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise GrammarError(f"a format's type must be one of {', '.join(_FORMATS)}")
    if depth >= MAX_NESTING:
        raise GrammarError(f"formats nest deeper than {MAX_NESTING} levels")
    required, optional, add = _FORMATS[kind]
    _only(value, kind, required=required, optional=(*optional, "type"))
    return add(grammar, value, depth + 1)


def _const_string(grammar: LarkGrammar, value: Mapping[str, Any], _: int) -> str:
    return grammar.rule(grammar.literal(_text(value, "value")))


def _json_schema(grammar: LarkGrammar, value: Mapping[str, Any], _: int) -> str:
    return grammar.schema(value["json_schema"])


def _regex(grammar: LarkGrammar, value: Mapping[str, Any], _: int) -> str:
    pattern = _text(value, "pattern")
    check_regex_size(pattern, "pattern")
    return grammar.regex(pattern)


def _any_text(grammar: LarkGrammar, _value: Mapping[str, Any], _: int) -> str:
    return grammar.terminal(r"/(?s:.)*/")


def _sequence(grammar: LarkGrammar, value: Mapping[str, Any], depth: int) -> str:
    elements = _list(value, "elements")
    if any(isinstance(one, dict) and one.get("type") == "any_text" for one in elements[:-1]):
        raise GrammarError("any_text must be the last element of a sequence, or the content of a tag with an end")
    return grammar.rule(" ".join(_format(grammar, one, depth) for one in elements))


def _or(grammar: LarkGrammar, value: Mapping[str, Any], depth: int) -> str:
    return grammar.rule(alternatives(_format(grammar, one, depth) for one in _list(value, "elements")))


def _tag(grammar: LarkGrammar, value: Mapping[str, Any], depth: int) -> str:
    return grammar.rule(f"{grammar.literal(_text(value, 'begin'))} {_content_and_end(grammar, value, depth)}")


def _content_and_end(grammar: LarkGrammar, tag: Mapping[str, Any], depth: int) -> str:
    """What follows the beginning of a tag. Free text goes up to the first end."""
    content, end = tag["content"], _text(tag, "end")
    if isinstance(content, dict) and content.get("type") == "any_text" and end:
        return grammar.text_until(end)
    return f"{_format(grammar, content, depth)} {grammar.literal(end)}"


def _tags_with_separator(grammar: LarkGrammar, value: Mapping[str, Any], depth: int) -> str:
    tags = _list_of_objects(value["tags"], "tags", ("begin", "content", "end"))
    tag = grammar.rule(alternatives(_tag(grammar, one, depth) for one in tags))
    separator = grammar.literal(_text(value, "separator"))
    more = "" if _flag(value, "stop_after_first") else f" ({separator} {tag})*"
    return grammar.rule(f"{tag}{more}" if _flag(value, "at_least_one") else f"({tag}{more})?")


def _triggered(grammar: LarkGrammar, value: Mapping[str, Any], depth: int) -> str:
    triggers = _list(value, "triggers")
    if not all(isinstance(trigger, str) and trigger for trigger in triggers):
        raise GrammarError("triggers must be texts that are not empty")
    triggered: list[tuple[str, str]] = []
    for tag in _list_of_objects(value["tags"], "tags", ("begin", "content", "end")):
        begin = _text(tag, "begin")
        trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
        if trigger is None:
            raise GrammarError(f"no trigger begins the tag {begin[:100]!r}")
        rest = _content_and_end(grammar, tag, depth)
        triggered.append((trigger, f"{grammar.literal(begin[len(trigger) :])} {rest}"))
    return grammar.text_between(
        triggered, at_least_one=_flag(value, "at_least_one"), only_one=_flag(value, "stop_after_first")
    )


_Adder = Callable[[LarkGrammar, Mapping[str, Any], int], str]

# type: (required members, optional members, what adds it)
_FORMATS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...], _Adder]]] = {
    "const_string": (("value",), (), _const_string),
    "json_schema": (("json_schema",), (), _json_schema),
    "regex": (("pattern",), (), _regex),
    "any_text": ((), (), _any_text),
    "sequence": (("elements",), (), _sequence),
    "or": (("elements",), (), _or),
    "tag": (("begin", "content", "end"), (), _tag),
    "triggered_tags": (("triggers", "tags"), ("at_least_one", "stop_after_first"), _triggered),
    "tags_with_separator": (("tags", "separator"), ("at_least_one", "stop_after_first"), _tags_with_separator),
}


def _only(value: Mapping[str, Any], what: str, *, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    for name in required:
        if name not in value:
            raise GrammarError(f"{what} needs {name!r}")
    for name in value:
        if name not in required and name not in optional:
            raise GrammarError(f"{what} has no {str(name)[:100]!r}")


def _list(value: Mapping[str, Any], name: str) -> list[Any]:
    found = value[name]
    if not isinstance(found, list) or not found:
        raise GrammarError(f"{name} must be a list that is not empty")
    return found


def _list_of_objects(value: Any, name: str, members: tuple[str, ...]) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise GrammarError(f"{name} must be a list of objects that is not empty")
    for one in value:
        _only(one, f"an entry of {name}", required=members, optional=("type",))
    return value


def _text(value: Mapping[str, Any], name: str) -> str:
    if not isinstance(value[name], str):
        raise GrammarError(f"{name} must be a text")
    return str(value[name])


def _flag(value: Mapping[str, Any], name: str) -> bool:
    if not isinstance(value.get(name, False), bool):
        raise GrammarError(f"{name} must be true or false")
    return bool(value.get(name, False))
