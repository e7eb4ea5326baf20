"""Every format: what was written comes back, however it is cut, and arguments as they are written; damage gives text or
a flagged call; linear time."""

from __future__ import annotations

import codecs
import json
import random
import time

import pytest

from penstock.frontend.parsers.choose import OutputStyle
from penstock.frontend.parsers.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    MessagePart,
    ParseWarning,
    Part,
    PartParser,
    Reasoning,
    ToolCall,
    merge_parts,
)

from .corpus import FORMATS, TOOLS, Format, damaged, make_sample, readable, style_of, text

SAMPLES_A_FORMAT = 14  # 322 messages of all formats, and as many damaged ones
IN_ONE_PIECE = ("qwen_coder", "glm", "gemma", "pythonic", "invoke")  # arguments that are no JSON text
STYLES = {form.name: style_of(form.template) for form in FORMATS}


def parse(style: OutputStyle, pieces: list[str], *, opening: str = "") -> list[MessagePart]:
    parser = style.parser(TOOLS, opening)
    assert parser is not None
    return run(parser, pieces)


def run(parser: PartParser, pieces: list[str]) -> list[MessagePart]:
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    check_order(parts)
    return merge_parts(parts)


def check_order(parts: list[Part]) -> None:
    """Nothing empty is given out; a call's parts stand together; what is not complete is flagged."""
    is_open, num_flags = False, 0
    for part in parts:
        assert part not in ("", CallArguments(""), Reasoning(""))
        match part:
            case CallStart():
                assert not is_open
                is_open = True
            case CallArguments():
                assert is_open
            case CallEnd(is_complete=is_complete):
                assert is_open
                is_open = False
                num_flags -= not is_complete
            case ParseWarning(kind=kind):
                num_flags += kind != "unknown_tool"
            case _:
                assert not is_open
    assert not is_open
    assert num_flags >= 0


def cut_bytes(written: str, rng: random.Random, longest: int) -> list[str]:
    """What an incremental decoder makes of the message's bytes in pieces."""
    data, decoder, pieces = written.encode(), codecs.getincrementaldecoder("utf-8")(), []
    while data:
        length = rng.randint(1, longest)
        pieces.append(decoder.decode(data[:length]))
        data = data[length:]
    return pieces


def cuts(written: str, rng: random.Random) -> list[list[str]]:
    return [
        [written],
        list(written),
        cut_bytes(written, rng, 1),
        cut_bytes(written, rng, 9),
        cut_bytes(written, rng, 90),
    ]


def without_space(value: str) -> str:
    return "".join(value.split())


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_what_was_written_comes_back(form: Format) -> None:
    rng = random.Random(form.name)
    for _ in range(SAMPLES_A_FORMAT):
        sample = make_sample(form, rng)
        for pieces in cuts(sample.written, rng):
            assert readable(parse(STYLES[form.name], pieces)) == sample.expected, sample.written


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_damaged_messages_parse_alike_in_any_pieces_and_lose_nothing(form: Format) -> None:
    rng = random.Random(form.name + "damaged")
    for _ in range(SAMPLES_A_FORMAT):
        written = damaged(make_sample(form, rng).written, rng)
        whole = parse(STYLES[form.name], [written])
        for pieces in cuts(written, rng):
            assert parse(STYLES[form.name], pieces) == whole, written
        for part in whole:
            if isinstance(part, ToolCall) and part.is_complete:
                assert isinstance(json.loads(part.arguments), dict)
        if not any(isinstance(part, ToolCall) for part in whole) and form.name not in ("harmony", "command_r"):
            said = "".join(
                part.text if isinstance(part, Reasoning) else part
                for part in whole
                if isinstance(part, (str, Reasoning))
            )
            for tag in form.thinks or ():
                written, said = written.replace(tag, ""), said.replace(tag, "")
            assert without_space(said) == without_space(written)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_json_arguments_come_as_they_are_written(form: Format) -> None:
    """Nearly every character of them in its own step, and never one that JSON does not allow there."""
    arguments = {"city": "word " * 50, "days": 7}
    written = form.write("", [("get_weather", arguments)])
    parser = STYLES[form.name].parser(TOOLS)
    assert parser is not None
    steps = [[part for part in parser.feed(character) if isinstance(part, CallArguments)] for character in written]
    num_steps = sum(bool(step) for step in steps)
    if form.name.startswith(IN_ONE_PIECE):
        assert num_steps <= 1
    else:
        assert num_steps > 240
    text = "".join(part.text for step in steps for part in step)
    assert (
        json.loads(text or "".join(part.text for part in parser.finish() if isinstance(part, CallArguments)))
        == arguments
    )


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_plain_text_is_content(form: Format) -> None:
    rng = random.Random(form.name + "plain")
    for _ in range(5):
        written = f"So {text(rng)}"
        assert parse(STYLES[form.name], cut_bytes(written, rng, 4)) == [written]


def cpu_s(form: Format, pieces: list[str]) -> float:
    parser = STYLES[form.name].parser(TOOLS)
    assert parser is not None
    started = time.process_time()
    for piece in pieces:
        parser.feed(piece)
    parser.finish()
    return time.process_time() - started


def long_messages(form: Format, num_chars: int) -> list[str]:
    """What grows: content, one call's arguments, the number of calls, what never becomes a call, white space."""
    call = form.write("", [("get_weather", {"city": "x", "tags": [1, "b"]})])
    opening = call[: call.index("get_weather")]
    word = "word <b> { "
    return [
        word * (num_chars // len(word)),
        form.write("", [("get_weather", {"tags": ["a", "\\n"] * (num_chars // 9)})]),
        call * (num_chars // len(call)),
        (opening or "[")[: len(opening) // 2 + 1] * (num_chars // (len(opening) // 2 + 1)),
        opening + "[" * num_chars,
        opening + " " * num_chars,
    ]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_the_work_is_linear(form: Format) -> None:
    """Four times the text takes far less than sixteen times the processor time, in one piece and in many."""
    small, large = long_messages(form, 25_000), long_messages(form, 100_000)
    for index, (short, long) in enumerate(zip(small, large, strict=True)):
        for size in (40, 10**9):
            ratios = []
            for _ in range(3):  # a busy machine may disturb a measurement, not three
                few, many = ([one[at : at + size] for at in range(0, len(one), size)] for one in (short, long))
                ratios.append(cpu_s(form, many) / max(cpu_s(form, few), 2e-3))
                if ratios[-1] < 6:
                    break
            assert min(ratios) < 6, (index, size, ratios)


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
    begun = '<tool_call>{"name": "noop", "arguments": {"a": [1, "b'
    assert parse(style, [begun]) == [
        ToolCall("noop", '{"a": [1, "b', is_complete=False),
        ParseWarning("unfinished_tool_call", "noop"),
    ]
    assert parse(style, [begun.replace('"b', "b") + "]}}</tool_call> And so on."]) == [
        ToolCall("noop", '{"a": [1, ', is_complete=False),
        "b]}} And so on.",
        ParseWarning("malformed_tool_call", "noop"),
    ]
    second = '<tool_call>[{"name": "noop"}, {"name": 3}]</tool_call>'
    assert parse(style, [second])[:2] == [ToolCall("noop", "{}"), ', {"name": 3}]']


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
    person = '{"name": "Ada", "age": 36}'
    assert parse(STYLES["llama_json"], [person])[0] == person
    assert parse(STYLES["llama_json"], ['{"name": "noop"}']) == [ToolCall("noop", "{}")]
    assert parse(STYLES["pythonic"], ["[1, 2] is a list."]) == ["[1, 2] is a list."]


def test_hostile_python_is_text() -> None:
    for written in (
        "[f(x=().__class__)]",
        "[f(1)]",
        "[f(**{})]",
        "[f(x=g())]",
        "[f(x=" + "(" * 5000 + ")]",
        "[f(x=b'')]",
        "[f(x=f'{y}')]",
        "[f(x=1, x=2)]",
        "[f(x=1e999)]",
        "[f(x=" + "9" * 5000 + ")]",
        "[f(x={1: 2})]",
        "[f(x='a' 'b') g]",
    ):
        assert parse(STYLES["pythonic"], [written])[0] == written
    good = """[f(a='it\\'s', b="x" 'y', c=(1, -2.5), d=(3), e={'k': [None, true,]}, f=0x1f, g=1_000,), h.i()]"""
    assert parse(STYLES["pythonic"], [good])[:2] == [
        ToolCall("f", '{"a":"it\'s","b":"xy","c":[1,-2.5],"d":3,"e":{"k":[null,true]},"f":31,"g":1000}'),
        ToolCall("h.i", "{}"),
    ]


def test_harmony_channels() -> None:
    written = (
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Done <|x|>.<|return|>"
    )
    assert parse(STYLES["harmony"], list(written)) == [Reasoning("Think."), "Done <|x|>."]
    recipient_first = '<|start|>assistant to=functions.noop<|channel|>commentary json<|message|>{"a": 1}'
    assert parse(STYLES["harmony"], [recipient_first]) == [ToolCall("noop", '{"a": 1}')]
    assert parse(STYLES["harmony"], ["no channels at all"]) == ["no channels at all"]
