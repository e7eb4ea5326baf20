"""Finds stop strings in text that comes piece by piece, giving out as much text as early as possible.

A stop string counts where it is complete first; of several complete at the same character, the longest. So the
outcome does not depend on how the text was cut into pieces. Time is linear in the text for each stop string.
Owns: the text held back because a stop string may have begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final


class StopStringMatcher:
    """One stream's search for its stop strings."""

    __slots__ = ("_first_characters", "_held", "_include", "_stops", "_tables", "matched")

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        """stops: none of them empty. include_in_output: the stop string found stays at the end of the text."""
        self._tables: Final = [_failure_table(stop) for stop in stops]
        self._stops: Final = list(stops)
        self._first_characters: Final = "".join({stop[0] for stop in stops})
        self._include: Final = include_in_output
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that is certain now. Once `matched` is set, all of it has been given out."""
        if not self._held and not any(character in text for character in self._first_characters):
            return text
        pending = self._held + text
        longest_partial = 0
        end: tuple[int, int] | None = None  # of the first match: (end, -length), in `pending`
        for stop, table in zip(self._stops, self._tables, strict=True):
            match_end, partial = _scan(pending, stop, table)
            longest_partial = max(longest_partial, partial)
            if match_end and (end is None or (match_end, -len(stop)) < end):
                end = (match_end, -len(stop))
                self.matched = stop
        if end is not None:
            self._held = ""
            return pending[: end[0]] if self._include else pending[: end[0] + end[1]]
        cut = len(pending) - longest_partial
        self._held = pending[cut:]
        return pending[:cut]

    def finish(self) -> str:
        """The text held back, now that no more comes."""
        held, self._held = self._held, ""
        return held


def _failure_table(pattern: str) -> list[int]:
    """Knuth, Morris, Pratt: for each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = table[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        table[index] = length
    return table


def _scan(text: str, stop: str, table: list[int]) -> tuple[int, int]:
    """(end of the first match or 0, length of the partial match at the end of the text)."""
    found = text.find(stop)
    if found >= 0:
        return found + len(stop), 0
    length = 0
    # Only the last len(stop) - 1 characters can be the beginning of a match.
    for character in text[-(len(stop) - 1) :] if len(stop) > 1 else "":
        while length and character != stop[length]:
            length = table[length - 1]
        if character == stop[length]:
            length += 1
    return 0, length
