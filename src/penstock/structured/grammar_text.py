"""From what a request asks for to a grammar in llguidance's language. Pure, but it may take long: see prover.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from llguidance.gbnf_to_lark import any_to_lark

from penstock.messages import GrammarKind, GrammarSpec, ToolCallSpec, Vocabulary
from penstock.messages.bounds import MAX_ENTRIES
from penstock.structured.backend import GrammarError
from penstock.structured.json_schema import parse_schema
from penstock.structured.lark import HEADER, LarkGrammar, alternatives
from penstock.structured.regex_size import check_regex_size
from penstock.structured.structural_tag import add_structural_tag
from penstock.structured.tool_calls import add_tool_calls


def special_tokens_by_text(vocabulary: Vocabulary) -> dict[str, int]:
    """The ids of the control tokens that have a text to write them by."""
    found: dict[str, int] = {}
    for token_id in vocabulary.special_token_ids:
        if 0 <= token_id < len(vocabulary.token_bytes) and (text := vocabulary.token_bytes[token_id]):
            found[text.decode(errors="replace")] = token_id
    return found


def grammar_text(spec: GrammarSpec, special_token_ids: Mapping[str, int]) -> str:
    """Raises GrammarError, naming what cannot be enforced."""
    if spec.kind is GrammarKind.GRAMMAR and not spec.after:
        # The list keeps a text that begins with a brace from being taken for one; the header comes last, so that places
        # in error messages are the user's.
        return json.dumps({"grammars": [{"lark_grammar": f"{_lark(spec.text)}\n{HEADER}"}]})
    grammar = LarkGrammar(special_token_ids)
    rule = _add(grammar, spec)
    if spec.after and spec.after_tokens:
        rule = grammar.after_at_most(spec.after, spec.after_tokens, spec.opened_by, rule)
    elif spec.after:
        rule = grammar.after(spec.after, rule)
    return grammar.finish(rule)


def _add(grammar: LarkGrammar, spec: GrammarSpec) -> str:
    return _WRITERS[spec.kind](grammar, spec.text)


def _json_object(grammar: LarkGrammar, _text: str) -> str:
    return grammar.schema({"type": "object"})


def _json_schema(grammar: LarkGrammar, text: str) -> str:
    return grammar.schema(parse_schema(text))


def _regex(grammar: LarkGrammar, text: str) -> str:
    check_regex_size(text, "the regular expression")
    return grammar.regex(text)


def _choice(grammar: LarkGrammar, text: str) -> str:
    choices = parse_schema(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise GrammarError("choices must be a list of texts that are not empty")
    if len(choices) > MAX_ENTRIES["choices"]:
        raise GrammarError(f"there are more than {MAX_ENTRIES['choices']} choices")
    return grammar.terminal(alternatives(json.dumps(one, ensure_ascii=False) for one in choices))


def _grammar(grammar: LarkGrammar, text: str) -> str:
    return grammar.grammar(_lark(text))


def _structural_tag(grammar: LarkGrammar, text: str) -> str:
    return add_structural_tag(grammar, parse_schema(text))


def _tool_calls(grammar: LarkGrammar, text: str) -> str:
    spec = msgspec.json.decode(text, type=ToolCallSpec)
    calls = add_tool_calls(grammar, spec)
    return calls if spec.content is None else grammar.rule(f"{calls} | {_add(grammar, spec.content)}")


def _text(grammar: LarkGrammar, _text: str) -> str:
    return grammar.any_tokens()


def _lark(text: str) -> str:
    """A user's grammar: Lark as it is, EBNF translated."""
    if not text.strip():
        raise GrammarError("the grammar is empty")
    if "::=" not in text:
        return text
    try:
        return str(any_to_lark(text))
    except Exception as error:  # whatever a foreign script raises on foreign text
        raise GrammarError(f"the EBNF cannot be read: {str(error)[:200]}") from None


_WRITERS: Final[dict[GrammarKind, Callable[[LarkGrammar, str], str]]] = {
    GrammarKind.JSON_OBJECT: _json_object,
    GrammarKind.JSON_SCHEMA: _json_schema,
    GrammarKind.REGEX: _regex,
    GrammarKind.CHOICE: _choice,
    GrammarKind.GRAMMAR: _grammar,
    GrammarKind.STRUCTURAL_TAG: _structural_tag,
    GrammarKind.TOOL_CALLS: _tool_calls,
    GrammarKind.TEXT: _text,
}
