"""The size of a regular expression with its counts written out."""

from __future__ import annotations

import pytest

from penstock.structured.backend import GrammarError
from penstock.structured.regex_size import MAX_EXPANDED_SIZE, check_regex_size, expanded_size


@pytest.mark.parametrize(("pattern", "size"), [
    ("", 0), ("abc", 3), ("a|b", 2), ("a*b+c?", 3), ("[a-z]{3}", 3), ("(ab){2,5}c", 11), ("a{3,}", 3), (r"\{3}", 3),
    (r"\d{4}", 4), (r"[\]a]{2}", 2), (r"[^]a]{2}", 2), (r"\p{Letter}{2}", 2), ("a{x}", 4),
    ("((a{30}){30}){30}", 27_000),
    (r"\x{1F600}{2}", 2), ("(a", 1), ("a)", 2), ("[a", 1), ("\\", 1),
])  # fmt: skip
def test_size(pattern: str, size: int) -> None:
    assert expanded_size(pattern) == size


def test_too_large_is_refused_and_named() -> None:
    check_regex_size(f"a{{{MAX_EXPANDED_SIZE}}}", "pattern")
    with pytest.raises(GrammarError, match="pattern: its counted repetitions make 50001 positions"):
        check_regex_size(f"a{{{MAX_EXPANDED_SIZE}}}b", "pattern")
