"""The grammar of tool calls in the form a model was trained on. A form is data.

A new form is one entry of FORMATS, under the name that its parser has in frontend.parsers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from penstock.messages import ToolCallSpec
from penstock.structured.backend import GrammarError
from penstock.structured.lark import LarkGrammar, alternatives

_NO_PARAMETERS: Final[dict[str, Any]] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class CallForm:
    """`open` call (`separator` call)* `close`, where a call is head(name), the arguments as JSON, `tail`.

    trigger: the beginning of all this that tells it from text; empty where nothing does, so that calls can be
    required, but not be watched for in text.
    """

    trigger: str
    open: str
    head: Callable[[str], str]
    tail: str
    separator: str
    close: str


def _json_head(name_key: str, arguments_key: str, before: str = "{") -> Callable[[str], str]:
    return lambda name: f'{before}"{name_key}": {json.dumps(name)}, "{arguments_key}": '


FORMATS: Final[Mapping[str, CallForm]] = {
    "hermes": CallForm(
        "<tool_call>", "", _json_head("name", "arguments", "<tool_call>\n{"), "}\n</tool_call>", "\n", ""
    ),
    "mistral": CallForm("[TOOL_CALLS]", "[TOOL_CALLS] [", _json_head("name", "arguments"), "}", ", ", "]"),
    "granite": CallForm("<|tool_call|>", "<|tool_call|>[", _json_head("name", "arguments"), "}", ", ", "]"),
    "command_r": CallForm(
        "<|START_ACTION|>", "<|START_ACTION|>[\n", _json_head("tool_name", "parameters"), "}", ",\n",
        "\n]<|END_ACTION|>",
    ),
    "deepseek": CallForm(
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁begin｜>", lambda name: f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>", "", "<｜tool▁calls▁end｜>",
    ),
    "llama_json": CallForm("", "", _json_head("name", "parameters"), "}", "; ", ""),
}  # fmt: skip


def add_tool_calls(grammar: LarkGrammar, spec: ToolCallSpec) -> str:
    """The rule of the calls, or of text with calls. Raises GrammarError."""
    form = FORMATS.get(spec.format)
    if form is None or not (spec.is_required or form.trigger):
        forms = [name for name, known in FORMATS.items() if spec.is_required or known.trigger]
        raise GrammarError(
            f"tool calls in the form of this model ({spec.format}) cannot be enforced",
            remedy=f"Forms that can: {', '.join(forms)}.",
        )
    if not spec.tools:
        raise GrammarError("there is no tool to call")
    if spec.is_required:
        return _calls(grammar, form, spec, "")
    triggered = [(form.trigger, _calls(grammar, form, spec, form.trigger))]
    return grammar.text_between(triggered, at_least_one=False, only_one=spec.max_calls == 1)


def _calls(grammar: LarkGrammar, form: CallForm, spec: ToolCallSpec, written: str) -> str:
    """The rule of one call or more. written: the beginning that stands already."""
    first: list[str] = []
    further: list[str] = []
    for tool in spec.tools:
        arguments = grammar.schema(tool.parameters or _NO_PARAMETERS, f"tool {tool.name!r}")
        rest = grammar.rule(f"{arguments} {grammar.literal(form.tail)}")
        head = form.head(tool.name)
        first.append(f"{grammar.literal((form.open + head).removeprefix(written))} {rest}")
        further.append(f"{grammar.literal(form.separator + head)} {rest}")
    calls = grammar.rule(alternatives(first))
    if spec.max_calls != 1:
        calls += f" {grammar.rule(alternatives(further))}*"
    return grammar.rule(f"{calls} {grammar.literal(form.close)}")
