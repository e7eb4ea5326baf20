"""How large a regular expression becomes when its counted repetitions are written out.

The library works with derivatives: their size, and the time for one, follow this number, not the pattern's length.
"""

from __future__ import annotations

from typing import Final

from penstock.structured.backend import GrammarError

MAX_EXPANDED_SIZE: Final = 50_000


def check_regex_size(pattern: str, where: str) -> None:
    """Raises GrammarError. Whether the pattern is valid at all is the library's to say."""
    size = expanded_size(pattern)
    if size > MAX_EXPANDED_SIZE:
        raise GrammarError(
            f"{where}: its counted repetitions make {size} positions, more than {MAX_EXPANDED_SIZE}",
            remedy="Use smaller counts.",
        )


def expanded_size(pattern: str) -> int:
    """Positions (characters and classes) with every `{m,n}` written out n times. Linear time."""
    sums = [0]  # of the open groups
    last = 0  # the last atom's size, which a quantifier multiplies
    index = 0
    while index < len(pattern):
        character = pattern[index]
        end = index + 1
        if character == "(":
            sums.append(0)
            last = 0
        elif character == ")" and len(sums) > 1:
            last = sums.pop()
            sums[-1] += last
        elif character == "{" and last and (count := _count(pattern, index)) is not None:
            highest, end = count
            sums[-1] += last * (highest - 1)
            last *= highest
        elif character not in "*+?|^$":
            end = _atom_end(pattern, index)
            last = 1
            sums[-1] += 1
        index = end
    return sum(sums)


def _count(pattern: str, start: int) -> tuple[int, int] | None:
    """(the higher count, the position behind) of a `{m}`, `{m,}` or `{m,n}` at `start`."""
    end = pattern.find("}", start, start + 24)
    if end < 0:
        return None
    low, _, high = pattern[start + 1 : end].partition(",")
    if not low.strip().isdecimal() or not (high.strip().isdecimal() or not high.strip()):
        return None
    return max(1, int(low), int(high or 0)), end + 1


def _atom_end(pattern: str, start: int) -> int:
    """The position behind the character, escape or class at `start`."""
    if pattern[start] == "\\":
        if pattern[start + 1 : start + 3] in ("p{", "P{", "x{", "u{"):
            close = pattern.find("}", start)
            return close + 1 if close >= 0 else len(pattern)
        return start + 2
    if pattern[start] != "[":
        return start + 1
    index = start + 1 + pattern.startswith("^", start + 1)
    index += pattern.startswith("]", index)
    while index < len(pattern) and pattern[index] != "]":
        index += 2 if pattern[index] == "\\" else 1
    return index + 1
