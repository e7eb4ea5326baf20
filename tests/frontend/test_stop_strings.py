"""The stop string that is complete first ends the text, however the text is cut into pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.frontend.stop_strings import StopStringMatcher

few_letters = st.text(alphabet="ab ", max_size=24)
stop_lists = st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), min_size=1, max_size=4)


def run(pieces: list[str], stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stops, include_in_output=include)
    text = ""
    for piece in pieces:
        text += matcher.feed(piece)
        if matcher.matched is not None:
            return text, matcher.matched
    return text + matcher.finish(), None


def expected(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """(end, -length, stop) of the match that ends first, found the slow way."""
    for end in range(1, len(text) + 1):
        matches = [(end, -len(stop), stop) for stop in stops if text[:end].endswith(stop)]
        if matches:
            return min(matches)
    return None


@given(text=few_letters, stops=stop_lists, cuts=st.lists(st.integers(0, 24)), include=st.booleans())
def test_any_cutting_finds_the_same(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    borders = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
    match = expected(text, stops)
    if match is None:
        assert run(pieces, stops, include=include) == (text, None)
    else:
        end, negative_length, stop = match
        assert run(pieces, stops, include=include) == (text[: end if include else end + negative_length], stop)


@given(text=few_letters, stops=stop_lists)
def test_no_more_is_held_back_than_could_still_match(text: str, stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    given_out = ""
    for end, character in enumerate(text, 1):
        given_out += matcher.feed(character)
        if matcher.matched is not None:
            return
        held = text[len(given_out) : end]
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(stop.startswith(text[start:end]) for stop in stops for start in range(len(given_out)))


@pytest.mark.parametrize(
    ("pieces", "stops", "text"),
    [
        (["Hello", " wor", "ld\n", "\nMore"], ["\n\n"], "Hello world"),
        (["a</", "s", ">b"], ["</s>"], "a"),
        (["aab", "aac"], ["aabaac"], ""),
        (["abc"], ["abc", "b"], "a"),
        (["xEND"], ["END", "xEND"], ""),
    ],
)
def test_stop_strings_across_pieces(pieces: list[str], stops: list[str], text: str) -> None:
    assert run(pieces, stops)[0] == text


def test_text_that_cannot_match_is_not_delayed() -> None:
    matcher = StopStringMatcher(["STOP"])
    assert matcher.feed("nothing held") == "nothing held"
    assert matcher.feed("an S") == "an "
    assert matcher.feed("o") == "So"
