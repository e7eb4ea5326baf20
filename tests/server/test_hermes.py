"""Tool calls: what is parsed never depends on how the text was cut, and nothing but white space is lost."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.server.hermes import CLOSE, OPEN, HermesParser, ParsedCall

CALL = OPEN + '\n{"name": "add", "arguments": {"a": 1, "b": [2, "}"]}}\n' + CLOSE

FRAGMENTS = st.sampled_from([
    CALL, OPEN, CLOSE, "Hello", " ", "\n", "<", "<tool", "_call>", "</", "</tool_call", "{", "}", '{"name": "f"}',
    '{"name": "f", "arguments": 3}', '{"name": "", "arguments": {}}', "é", OPEN + OPEN, "x <tool_calls>", "\u3000",
])  # fmt: skip


def parse(pieces: list[str]) -> tuple[str, list[ParsedCall]]:
    parser = HermesParser()
    found = [item for piece in pieces for item in parser.feed(piece)] + parser.finish()
    assert all(found), "nothing empty is emitted"
    calls = [item for item in found if isinstance(item, ParsedCall)]
    assert parser.num_calls == len(calls)
    return "".join(item for item in found if isinstance(item, str)), calls


@given(st.lists(FRAGMENTS, max_size=12).map("".join), st.data())
def test_cuts_do_not_matter(text: str, data: st.DataObject) -> None:
    whole = parse([text])
    assert parse(list(text)) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    assert parse([text[start:end] for start, end in itertools.pairwise(edges)]) == whole


@given(st.lists(FRAGMENTS, max_size=12).map("".join))
def test_text_without_a_valid_call_is_kept_whole(text: str) -> None:
    content, calls = parse([text])
    if not calls:
        assert "".join(content.split()) == "".join(text.split())
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)


def test_text_without_any_tag_is_untouched() -> None:
    assert parse([" a < b \n\n", " c </tool "]) == (" a < b \n\n c </tool ", [])


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (CALL, "", ["add"]),
        ("\n\n" + CALL + "\n", "", ["add"]),
        ("Let me see. " + CALL + CALL, "Let me see.", ["add", "add"]),
        (CALL + "\n then", "then", ["add"]),
        (CALL[: -len(CLOSE)], "", ["add"]),
        (OPEN + "{broken" + CLOSE, OPEN + "{broken" + CLOSE, []),
        (OPEN + '{"name": "f", "arguments": "text"}' + CLOSE, OPEN + '{"name": "f", "arguments": "text"}' + CLOSE, []),
        (OPEN + '{"name": "f"}' + CLOSE, "", ["f"]),
        ("a" + OPEN, "a" + OPEN, []),
    ],
)
def test_examples(text: str, content: str, names: list[str]) -> None:
    found, calls = parse([text])
    assert (found, [call.name for call in calls]) == (content, names)


def test_arguments_are_the_models_own_text() -> None:
    _, calls = parse([OPEN + '{"name":"f","arguments":{"b" :  1.50, "a":"\\u00e9"}}' + CLOSE])
    assert calls == [ParsedCall("f", '{"b" :  1.50, "a":"\\u00e9"}')]


def test_long_text_takes_linear_work() -> None:
    parser = HermesParser()
    size = sum(len(item) for _ in range(20_000) for item in parser.feed("<tool_cal ") if isinstance(item, str))
    size += sum(len(item) for item in parser.finish() if isinstance(item, str))
    assert size == 200_000
