"""The grammar of tool calls in the form a model was trained on. A form is data: messages.CallForm."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from penstock.messages import CallForm, CallStyle, ToolCallSpec, ToolSpec
from penstock.structured.backend import GrammarError
from penstock.structured.call_arguments import add_arguments
from penstock.structured.lark import LarkGrammar, alternatives

_NO_PARAMETERS: Final[Mapping[str, Any]] = {"type": "object"}
# Names stand bare in forms that are not JSON.
_BARE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")


def add_tool_calls(grammar: LarkGrammar, spec: ToolCallSpec) -> str:
    """The rule of the calls, or of text with calls. Raises GrammarError."""
    form = spec.form
    if not spec.tools:
        raise GrammarError("there is no tool to call")
    if form.style is CallStyle.HARMONY:
        return _harmony(grammar, spec)
    if spec.is_required:
        return _calls(grammar, form, spec, "")
    if form.trigger:
        triggered = [(form.trigger, _calls(grammar, form, spec, form.trigger))]
        return grammar.text_between(triggered, at_least_one=False, only_one=spec.max_calls == 1 or form.is_single)
    if not form.starts:
        raise GrammarError(f"nothing tells tool calls in the form of this model ({form.name}) from text")
    barred = re.escape(form.starts)
    text = grammar.terminal(rf"/\s*[^\s{barred}](?s:.*)/")
    return grammar.rule(f"{_calls(grammar, form, spec, '')} | {text}?")


def _calls(grammar: LarkGrammar, form: CallForm, spec: ToolCallSpec, written: str) -> str:
    """The rule of one call or more. written: the beginning that stands already."""
    first: list[str] = []
    further: list[str] = []
    for tool in spec.tools:
        rest = grammar.rule(f"{_after_name(grammar, form)} {_arguments(grammar, form, tool)}")
        name = _name(form, tool)
        first.append(f"{grammar.literal((form.open + form.before_name + name).removeprefix(written))} {rest}")
        further.append(f"{grammar.literal(form.separator + form.before_name + name)} {rest}")
    calls = grammar.rule(alternatives(first))
    if spec.max_calls != 1 and not form.is_single:
        calls += f" {grammar.rule(alternatives(further))}*"
    return grammar.rule(f"{calls} {grammar.literal(form.close)}")


def _name(form: CallForm, tool: ToolSpec) -> str:
    if form.style is CallStyle.JSON and form.before_name.endswith('"'):
        return json.dumps(tool.name, ensure_ascii=False)[1:-1]
    if not _BARE_NAME.fullmatch(tool.name):
        raise GrammarError(f"{tool.name[:100]!r} cannot be the name of a tool in the form of this model ({form.name})")
    return tool.name


def _after_name(grammar: LarkGrammar, form: CallForm) -> str:
    number = f'":" {grammar.terminal("/[0-9]{1,2}/")} ' if form.is_numbered else ""
    return f"{number}{grammar.literal(form.after_name)}"


def _arguments(grammar: LarkGrammar, form: CallForm, tool: ToolSpec) -> str:
    """The arguments and what ends the call."""
    where = f"tool {tool.name!r}"
    if form.style is CallStyle.JSON:
        arguments = grammar.schema(tool.parameters or _NO_PARAMETERS, where)
    else:
        arguments = add_arguments(grammar, form, tool.parameters, where)
    return f"{arguments} {grammar.literal(form.tail)}"


def _harmony(grammar: LarkGrammar, spec: ToolCallSpec) -> str:
    """Any number of messages for the model itself, then one call, or a final message.

    A call ends with a token that ends the output, so there is one, and the token is not part of the grammar.
    """
    text = grammar.terminal(r"/(?s:.)*/")
    aside = grammar.rule(
        f'{grammar.literal("<|channel|>")} ("analysis" | "commentary") {grammar.literal("<|message|>")} '
        f"{grammar.text_until('<|end|>')} {grammar.literal('<|start|>assistant')}"
    )
    calls: list[str] = []
    for tool in spec.tools:
        _name(spec.form, tool)
        begin = grammar.literal(f"<|channel|>commentary to=functions.{tool.name} <|constrain|>json<|message|>")
        calls.append(f"{begin} {grammar.schema(tool.parameters or _NO_PARAMETERS, f'tool {tool.name!r}')}")
    ends = [grammar.rule(alternatives(calls))]
    if not spec.is_required:
        ends.append(grammar.rule(f"{grammar.literal('<|channel|>final<|message|>')} {text}"))
    return grammar.rule(f"{aside}* ({alternatives(ends)})")
