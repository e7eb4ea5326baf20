"""Every format: what was written comes back, however it is cut; damage gives text or a flagged call; linear time."""

from __future__ import annotations

import json
import random

import pytest

from penstock.frontend.parsers.choose import OutputStyle
from penstock.frontend.parsers.parts import ParseWarning, Part, PartParser, Reasoning, ToolCall, merge_parts

from .corpus import FORMATS, TOOLS, Format, damaged, make_sample, readable, style_of, text

SAMPLES_A_FORMAT = 12
STYLES = {form.name: style_of(form.template) for form in FORMATS}


def parse(style: OutputStyle, pieces: list[str], *, opening: str = "") -> list[Part]:
    parser = style.parser(TOOLS, opening)
    assert parser is not None
    return run(parser, pieces)


def run(parser: PartParser, pieces: list[str]) -> list[Part]:
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    assert "" not in parts, "nothing empty is given out"
    return merge_parts(parts)


def cut(written: str, rng: random.Random, longest: int) -> list[str]:
    pieces = []
    while written:
        length = rng.randint(1, longest)
        pieces.append(written[:length])
        written = written[length:]
    return pieces


def without_space(value: str) -> str:
    return "".join(value.split())


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_what_was_written_comes_back(form: Format) -> None:
    rng = random.Random(form.name)
    for _ in range(SAMPLES_A_FORMAT):
        sample = make_sample(form, rng)
        whole = parse(STYLES[form.name], [sample.written])
        assert readable(whole) == sample.expected, sample.written
        assert parse(STYLES[form.name], list(sample.written)) == whole
        assert parse(STYLES[form.name], cut(sample.written, rng, 9)) == whole


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_damaged_messages_parse_alike_in_any_pieces_and_lose_nothing(form: Format) -> None:
    rng = random.Random(form.name + "damaged")
    for _ in range(SAMPLES_A_FORMAT):
        written = damaged(make_sample(form, rng).written, rng)
        whole = parse(STYLES[form.name], [written])
        assert parse(STYLES[form.name], list(written)) == whole, written
        assert parse(STYLES[form.name], cut(written, rng, 7)) == whole, written
        for part in whole:
            if isinstance(part, ToolCall):
                assert isinstance(json.loads(part.arguments), dict)
        if not any(isinstance(part, ToolCall) for part in whole) and form.name not in ("harmony", "command_r"):
            said = "".join(
                part.text if isinstance(part, Reasoning) else part
                for part in whole
                if not isinstance(part, ParseWarning)
            )
            for tag in form.thinks or ():
                written, said = written.replace(tag, ""), said.replace(tag, "")
            assert without_space(said) == without_space(written)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_plain_text_is_content(form: Format) -> None:
    rng = random.Random(form.name + "plain")
    for _ in range(5):
        written = f"So {text(rng)}"
        assert parse(STYLES[form.name], cut(written, rng, 4)) == [written]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_megabyte_takes_linear_work(form: Format) -> None:
    """The characters that the parser's searches look at, counted: at most a few for each that came in."""
    rng = random.Random(1)
    sample = make_sample(form, rng).written
    for filler in ("word ", " " * 5, "<", '{"a": ["', "<|", "\n"):
        work = Counted.work
        parser = STYLES[form.name].parser(TOOLS)
        assert parser is not None
        num_chars = 0
        for piece in [sample[: len(sample) // 2], *[filler] * 20_000]:
            parser.feed(Counted(piece))
            num_chars += len(piece)
        parser.finish()
        assert Counted.work - work < 100 * num_chars


class Counted(str):
    """Text that counts the characters of what grows out of it by joining: quadratic parsers copy what they hold."""

    __slots__ = ()
    work = 0

    def __radd__(self, other: str) -> Counted:
        Counted.work += len(other) + len(self)
        return Counted(str.__add__(other, self))


def test_the_choice_is_read_off_the_template() -> None:
    for form in FORMATS:
        style = STYLES[form.name]
        name = style.tool_format.name if style.tool_format else "harmony"
        assert form.name.startswith(name)
        if form.thinks:
            assert style.reasoning is not None
            assert (style.reasoning.open, style.reasoning.close) == form.thinks
    assert not style_of("nothing of the kind").knows_calls
    assert style_of("nothing of the kind").parser(TOOLS) is None


def test_without_tools_calls_are_content_and_reasoning_is_still_split() -> None:
    written = '<think>a</think><tool_call>{"name": "noop", "arguments": {}}</tool_call>'
    parser = STYLES["hermes"].parser(None)
    assert parser is not None
    assert run(parser, list(written)) == [Reasoning("a"), written.partition("</think>")[2]]


def test_a_prompt_that_opens_the_tag_starts_inside() -> None:
    style = STYLES["hermes"]
    assert parse(style, ["I see.", "</thi", "nk>\n\nYes"], opening="<|im_start|>assistant\n<think>\n") == [
        Reasoning("I see."), "Yes",
    ]  # fmt: skip
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert parse(style, ["I see.</think> Yes"], opening=closed) == ["I see.</think> Yes"]
    assert parse(style, ["never ends"], opening="<think>") == [Reasoning("never ends")]


def test_tags_further_on_are_what_the_model_writes_about() -> None:
    assert parse(STYLES["hermes"], ["The tag <think> opens, </think> closes."]) == [
        "The tag <think> opens, </think> closes."
    ]


def test_unknown_tools_and_malformed_calls_are_flagged() -> None:
    style = STYLES["hermes"]
    known, unknown = [parse(style, [f'<tool_call>{{"name": "{n}"}}</tool_call>']) for n in ("noop", "zap")]
    assert known == [ToolCall("noop", "{}")]
    assert unknown == [ToolCall("zap", "{}"), ParseWarning("unknown_tool", "zap")]
    for written, kind in (
        ('<tool_call>{"name": "noop", "arguments": 3}</tool_call>', "malformed_tool_call"),
        ('<tool_call>{"name": "noop", "argu', "unfinished_tool_call"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "malformed_tool_call"),
    ):
        content, warning = parse(style, [written])
        assert content == written
        assert isinstance(warning, ParseWarning)
        assert warning.kind == kind


def test_arguments_keep_the_models_own_text() -> None:
    written = '<tool_call>{"name":"noop","arguments":{"b" :  1.50, "a":"\\u00e9"}}</tool_call>'
    assert parse(STYLES["hermes"], [written]) == [ToolCall("noop", '{"b" :  1.50, "a":"\\u00e9"}')]
    as_text = json.dumps({"name": "noop", "arguments": '{"a": 1}'})
    assert parse(STYLES["hermes"], [f"<tool_call>{as_text}</tool_call>"]) == [ToolCall("noop", '{"a": 1}')]


def test_json_that_is_no_call_streams_on() -> None:
    parser = STYLES["llama_json"].parser(TOOLS)
    assert parser is not None
    answer = '{"temperature": 21, "wind": "none", "note": "' + "x" * 100
    assert "".join(str(part) for piece in answer for part in parser.feed(piece)) == answer
    assert parse(STYLES["llama_json"], ['{"a": 1}']) == ['{"a": 1}']
    assert parse(STYLES["pythonic"], ["[1, 2] is a list."]) == ["[1, 2] is a list."]


def test_hostile_python_is_text() -> None:
    for written in (
        "[f(x=().__class__)]",
        "[f(1)]",
        "[f(**{})]",
        "[f(x=g())]",
        "[f(x=" + "(" * 5000 + ")]",
        "[f(x=b'')]",
    ):
        assert parse(STYLES["pythonic"], [written])[0] == written


def test_harmony_channels() -> None:
    written = (
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Done <|x|>.<|return|>"
    )
    assert parse(STYLES["harmony"], list(written)) == [Reasoning("Think."), "Done <|x|>."]
    recipient_first = '<|start|>assistant to=functions.noop<|channel|>commentary json<|message|>{"a": 1}'
    assert parse(STYLES["harmony"], [recipient_first]) == [ToolCall("noop", '{"a": 1}')]
    assert parse(STYLES["harmony"], ["no channels at all"]) == ["no channels at all"]
