"""The scanner agrees with json on what is JSON, whole or begun, however it is cut; checked against json and jiter."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jiter import from_json

from penstock.frontend.parsers.json_scanner import JsonScanner, completed_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ALPHABET = '{}[]",:\\u0aD1-+.eEtrufalsn \n\x01é'


def scan(pieces: list[str]) -> tuple[str, JsonScanner, str]:
    """(what was passed on, the scanner, what was not)."""
    scanner, passed = JsonScanner(), ""
    for index, piece in enumerate(pieces):
        certain, position = scanner.feed(piece)
        passed += certain
        if scanner.is_whole or scanner.is_broken:
            return passed, scanner, scanner.held + piece[position:] + "".join(pieces[index + 1 :])
    return passed, scanner, scanner.held


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda _: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return False
    return True


@given(VALUES.filter(lambda value: isinstance(value, (dict, list, str))), st.integers(1, 9), st.booleans())
@settings(deadline=None, max_examples=150)
def test_what_json_writes_is_passed_on_whole(value: Any, size: int, is_ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii, indent=1)
    passed, scanner, rest = scan([text[at : at + size] for at in range(0, len(text), size)] + [" tail"])
    assert (passed, scanner.is_whole, rest) == (text, True, " tail")


@given(st.text(ALPHABET, max_size=14), st.integers(1, 4))
@settings(deadline=None, max_examples=600)
def test_it_accepts_what_json_accepts(inner: str, size: int) -> None:
    text = '{"a":' + inner + "}"
    passed, scanner, rest = scan([text])
    assert passed + rest == text
    assert (scanner.is_whole and not rest) == is_json(text)
    cut = scan([text[at : at + size] for at in range(0, len(text), size)])
    assert (cut[0], cut[2], cut[1].is_whole, cut[1].is_broken) == (passed, rest, scanner.is_whole, scanner.is_broken)


@pytest.mark.parametrize("seed", range(5))
def test_every_beginning_is_completed_as_other_readers_do(seed: int) -> None:
    """What is passed on never makes a partial reader fail, and completed_object is what it finds of whole members."""
    rng = random.Random(seed)
    value = {"a": "x\n\u00e9", "b": [1, -2.5e3, {"c": None}], "": {"d": [[], {}]}, "e": rng.random(), "f": "last"}
    text = json.dumps(value)
    for end in range(1, len(text) + 1):
        passed, _, _ = scan([text[:end]])
        assert json.loads(completed_object(passed)) == from_json(passed.encode(), partial_mode=True), passed


def test_bounds() -> None:
    for broken in ("[" * 65, "[" + "1" * 401, '["\x1f'):
        assert scan([broken])[1].is_broken
    assert not scan(["[" * 64])[1].is_broken
