"""Formats learnt from a template by a probe, and the choice for templates that models really ship with."""

from __future__ import annotations

import pytest

from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.parsers.choose import OutputStyle
from penstock.frontend.parsers.parts import ParseWarning, ToolCall, merge_parts

from .corpus import TOOLS

# A template with the usual frame; CALL is how it writes one call.
FRAME = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}BEGIN{% for c in m.tool_calls %}CALL{% endfor %}END"
    "{% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def style(call: str, begin: str = "", end: str = "") -> OutputStyle:
    source = FRAME.replace("BEGIN", begin).replace("END", end).replace("CALL", call)
    return OutputStyle.of(ChatTemplate({"default": source}, {}))


@pytest.mark.parametrize(
    ("call", "begin", "end", "written"),
    [
        ('<fn>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments|tojson }}}</fn>', "", "",
         '<fn>{"name": "noop", "arguments": {"a": 1}}</fn>'),
        ('{"tool": "{{ c.function.name }}", "input": {{ c.function.arguments|tojson }}}', "<calls>[", "]</calls>",
         '<calls>[{"tool": "noop", "input": {"a": 1}}]</calls>'),
        ("<|fn|>{{ c.function.name }}<|with|>{{ c.function.arguments|tojson }}<|/fn|>", "", "",
         '<|fn|>noop<|with|>{"a": 1}<|/fn|>'),
        ('{"tool": "{{ c.function.name }}", "input": {{ c.function.arguments|tojson }}}', "", "",
         '{"tool": "noop", "input": {"a": 1}}'),
    ],
)  # fmt: skip
def test_the_probe_finds_the_markers(call: str, begin: str, end: str, written: str) -> None:
    chosen = style(call, begin, end)
    assert chosen.tool_format is not None
    assert chosen.tool_format.name == "generic"
    for pieces in ([written], list(written)):
        parser = chosen.parser(TOOLS)
        assert parser is not None
        parts = merge_parts([part for piece in pieces for part in parser.feed(piece)] + parser.finish())
        assert parts == [ToolCall("noop", '{"a": 1}')]
    form = chosen.call_form
    assert form is not None
    assert form.before_name + "noop" + form.after_name + '{"a": 1}' + form.tail == written
    assert written.startswith(form.trigger)
    assert bool(form.trigger) == (not written.startswith("{"))
    parser = chosen.parser(TOOLS)
    assert parser is not None
    broken = written.replace(": 1", ": ")
    parts = merge_parts(parser.feed(broken) + parser.finish())
    assert parts[0] == ToolCall("noop", '{"a": ', is_complete=False)
    assert parts[-1] == ParseWarning("malformed_tool_call", parts[-1].detail)  # type: ignore[union-attr]


def test_a_template_that_writes_no_calls_has_no_format() -> None:
    assert style("", "", "").tool_format is None
    assert OutputStyle.of(ChatTemplate({}, {})).tool_format is None
    refusing = ChatTemplate({"default": "{{ raise_exception('no') }}"}, {})
    assert OutputStyle.of(refusing).tool_format is None
