"""Each kind of grammar takes what it should and nothing else; calls are those that the parsers of the form read."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from vocabularies import EOS, small_vocabulary, tokenize

from penstock.frontend.parsers.call_forms import call_form
from penstock.messages import CallForm, GrammarKind, GrammarSpec, ToolCallSpec, ToolSpec
from penstock.structured.backend import GrammarError
from penstock.structured.closing import ClosingTokens, closing_path
from penstock.structured.llguidance_backend import LlguidanceBackend

VOCABULARY = small_vocabulary()
BACKEND = LlguidanceBackend(VOCABULARY)
CLOSING = ClosingTokens(VOCABULARY)
OLD_TAG = {
    "structures": [
        {"begin": "<f=a>", "schema": {"type": "object", "properties": {"x": {"type": "integer"}}}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"type": "boolean"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}
NEW_TAG = {"type": "structural_tag", "format": {
    "type": "triggered_tags", "triggers": ["<tool_call>"], "at_least_one": True, "stop_after_first": True,
    "tags": [{"begin": "<tool_call>a", "content": {"type": "regex", "pattern": "[0-9]+"}, "end": "</tool_call>"}],
}}  # fmt: skip
SEQUENCE = {"format": {"type": "sequence", "elements": [
    {"type": "const_string", "value": "go:"},
    {"type": "or", "elements": [{"type": "json_schema", "json_schema": {"type": "integer"}},
                                {"type": "tag", "begin": "(", "content": {"type": "any_text"}, "end": ")"}]},
    {"type": "tags_with_separator", "separator": ",", "tags": [
        {"begin": "<", "content": {"type": "regex", "pattern": "[a-z]"}, "end": ">"}]},
]}}  # fmt: skip
HERMES = call_form("hermes", [])
assert HERMES is not None
TOOLS = [
    ToolSpec("get", {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}),
    ToolSpec("put"),
]
CASES = [
    (GrammarSpec.json_object(), ['{}', '{"a": [1, {"b": null}]}'], ["[]", "1", "{", '{"a" 1}', " {}"]),
    (GrammarSpec.json_schema({"type": "integer", "minimum": 5}), ["5", "123"], ["4", "-5", "05", "5.0"]),
    (GrammarSpec.regex(r"[a-c]{2}/\d+\n"), ["ab/1\n", "cc/99\n"], ["ab/1", "ad/1\n", "ab1\n"]),
    (GrammarSpec.choice(["a", "ab", 'é"\n', "x/y\\"]), ["a", "ab", 'é"\n', "x/y\\"], ["", "b", "aba", "x"]),
    (GrammarSpec.grammar('start: "a" INT ("," INT)*\nINT: /[0-9]{2}/\n'), ["a12", "a12,34"], ["a1", "a12,"]),
    (GrammarSpec.grammar('root ::= "x" item+\nitem ::= [0-9] "y"?\n'), ["x1", "x1y22y"], ["x", "y"]),
    (GrammarSpec.structural_tag(OLD_TAG), ["", "hello", 'see <f=a>{"x": 1}</f> and <f=b>true</f>.'],
     ["<f=c>", "<f=b>1</f>", "<f=a>{}", '<f=a>{"x": "1"}</f>']),
    (GrammarSpec.structural_tag(NEW_TAG), ["<tool_call>a12</tool_call>", "well <tool_call>a1</tool_call>"],
     ["", "well", "<tool_call>b", "<tool_call>a1</tool_call> more"]),
    (GrammarSpec.structural_tag(SEQUENCE), ["go:1", "go:(x)<a>,<b>", "go:(" + "y" * 50 + ")"], ["go:", "go:x", "1"]),
    (msgspec.structs.replace(GrammarSpec.choice(["yes"]), after="</think>"), ["hm{</think>yes", "</think>\n\nyes"],
     ["yes", "hm</think>no", "hm"]),
    (msgspec.structs.replace(GrammarSpec.grammar('start: A\nA: "yes"'), after="[/T]"), ["hm[/T]yes"], ["yes", "h[/T]"]),
]  # fmt: skip


BUDGETED = {"after": "</think>", "after_tokens": 3}
CASES += [
    (msgspec.structs.replace(GrammarSpec(GrammarKind.TEXT), **BUDGETED),
     ["abc</think>", "a</think>yes<tool_call>", "</think>"], ["abcd</think>", "abc", ""]),
    (msgspec.structs.replace(GrammarSpec.choice(["yes"]), **BUDGETED),
     ["abc</think>\nyes"], ["abcd</think>yes", "yes"]),
    (msgspec.structs.replace(GrammarSpec(GrammarKind.TEXT), **BUDGETED, opened_by="<tool_call>"),
     ["<tool_call>abc</think>so", "no thought at all", ""], ["<tool_call>abcd</think>"]),
]  # fmt: skip


def takes(spec: GrammarSpec, text: str) -> bool:
    text_of_library = BACKEND.text(spec)
    BACKEND.check(text_of_library)
    matcher = BACKEND.compile(text_of_library)
    return all(matcher.consume(token_id) for token_id in tokenize(text)) and matcher.is_complete()


@pytest.mark.parametrize(("spec", "good", "bad"), CASES)
def test_it_takes_what_it_should_and_nothing_else(spec: GrammarSpec, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not takes(spec, text)] == []
    assert [text for text in bad if takes(spec, text)] == []


@pytest.mark.parametrize(("spec", "message"), [
    (GrammarSpec.regex("(a"), "unclosed group"),
    (GrammarSpec.regex("(?=a)b"), "look-around"),
    (GrammarSpec.choice([]), "not empty"),
    (msgspec.structs.replace(GrammarSpec(GrammarKind.TEXT), after="</x>", after_tokens=3), "</x> is no token"),
    (GrammarSpec.grammar("  "), "empty"),
    (GrammarSpec.grammar('start: "a'), "1\\(10\\)"),
    (GrammarSpec.grammar("root ::= (("), "EBNF"),
    (GrammarSpec.grammar('{"grammars": [{"json_schema": {"x-guidance": {"lenient": true}}}]}'), "expecting rule"),
    (GrammarSpec.json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
    (GrammarSpec.json_schema({"type": "string", "format": "uri-template"}), "uri-template"),
    (GrammarSpec.json_schema({"type": "integer", "minimum": 3, "maximum": 2}), "Unsatisfiable|range|no text"),
    (GrammarSpec.structural_tag({"structures": []}), "triggers"),
    (GrammarSpec.structural_tag({**OLD_TAG, "triggers": ["<x"]}), "no trigger begins"),
    (GrammarSpec.structural_tag({"format": {"type": "qwen_xml_parameter"}}), "must be one of"),
    (GrammarSpec.structural_tag({"format": {"type": "const_string", "value": "a", "mood": 1}}), "mood"),
    (ToolCallSpec(CallForm(name="odd", after_name=":"), [ToolSpec("a b")], is_required=True).to_grammar("tools"),
     "'a b'.*odd"),
    (ToolCallSpec(CallForm(name="odd"), TOOLS, is_required=False).to_grammar("tools"), "odd.*from text"),
    (ToolCallSpec(HERMES, [], is_required=True).to_grammar("tools"), "no tool"),
    (ToolCallSpec(HERMES, [ToolSpec("f", {"not": {"type": "null"}})], is_required=True).to_grammar("tools"),
     "tool 'f': 'not'"),
])  # fmt: skip
def test_what_cannot_be_enforced_is_refused_by_name(spec: GrammarSpec, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        takes(spec, "")


@pytest.mark.parametrize("is_required", [True, False])
def test_calls_are_enforced(is_required: bool) -> None:
    spec = ToolCallSpec(HERMES, TOOLS, is_required=is_required).to_grammar("tools")
    call = '<tool_call>\n{"name": "get", "arguments": {"x": 12}}\n</tool_call>'
    both = call + '\n<tool_call>\n{"name": "put", "arguments": {"a": [1]}}\n</tool_call>'
    assert takes(spec, both)
    assert takes(spec, call)
    assert not takes(spec, both.replace("12", '"12"'))
    assert not takes(spec, both.replace("put", "cut"))
    assert takes(spec, "just text") is not is_required
    only_one = ToolCallSpec(HERMES, TOOLS, is_required=is_required, max_calls=1).to_grammar("tools")
    assert takes(only_one, call)
    assert not takes(only_one, both)


def test_an_answer_may_be_calls_or_what_the_response_format_asks_for() -> None:
    content = GrammarSpec.json_schema({"type": "integer"})
    spec = ToolCallSpec(HERMES, TOOLS, is_required=True, content=content).to_grammar("tools")
    assert takes(spec, "12")
    assert takes(spec, '<tool_call>\n{"name": "get", "arguments": {"x": 1}}\n</tool_call>')
    assert not takes(spec, "text")


def test_control_tokens_are_no_text() -> None:
    matcher = BACKEND.compile(BACKEND.text(GrammarSpec.regex(r"(?s:.)*")))
    mask = np.zeros(-(-len(VOCABULARY.token_bytes) // 32), dtype=np.int32)
    matcher.fill_mask(mask.ctypes.data, mask.nbytes)
    allowed = set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())
    assert EOS in allowed
    assert not allowed & (set(VOCABULARY.special_token_ids) - {EOS})
    assert max(allowed) == EOS  # ids without text never come


@pytest.mark.parametrize(("spec", "prefix"), [
    (GrammarSpec.json_object(), '{"a'),
    (GrammarSpec.json_schema({"type": "array", "items": {"type": "string", "minLength": 9}, "minItems": 2}), '["x'),
    (GrammarSpec.json_schema({"type": "object", "properties": {"deep": {"type": "object", "properties": {
        "n": {"type": "number"}, "on": {"type": "boolean"}}, "required": ["n", "on"]}}, "required": ["deep"]}), ""),
    (GrammarSpec.regex(r"[a-z]+-\d+/x"), "abc"),
    (GrammarSpec.regex("a+b"), "aa"),
    (GrammarSpec.regex("(the |a )*(cat|z+y)z"), "the "),
    (msgspec.structs.replace(GrammarSpec.json_object(), after="</think>"), "so I think"),
    (ToolCallSpec(HERMES, TOOLS, is_required=True).to_grammar("tools"), "<tool_call>\n"),
])  # fmt: skip
def test_a_way_to_the_end_is_one(spec: GrammarSpec, prefix: str) -> None:
    matcher = BACKEND.compile(BACKEND.text(spec))
    for token_id in tokenize(prefix):
        assert matcher.consume(token_id)
    mask = np.zeros(-(-len(VOCABULARY.token_bytes) // 32), dtype=np.int32)
    path = closing_path(matcher, CLOSING, mask, 100)
    assert path is not None
    assert matcher.accepts_all(path)
    for token_id in path:
        matcher.consume(token_id)
    assert matcher.is_complete()


def test_a_way_that_is_too_long_is_none() -> None:
    matcher = BACKEND.compile(BACKEND.text(GrammarSpec.regex("[a-f]{20}")))
    mask = np.zeros(-(-len(VOCABULARY.token_bytes) // 32), dtype=np.int32)
    assert closing_path(matcher, CLOSING, mask, 19) is None
    assert len(closing_path(matcher, CLOSING, mask, 20) or ()) == 20
