"""Two small parts of every incremental parser: white space at edges, and tails that may become a marker."""

from __future__ import annotations

import re
from collections.abc import Sequence


class EdgeTrimmer:
    """Passes text on, without the white space at its edges: that is held back until it turns out to be inside."""

    __slots__ = ("_held", "_is_fresh")

    def __init__(self, *, trims_start: bool) -> None:
        self._is_fresh = trims_start
        self._held: list[str] = []

    def feed(self, text: str) -> str:
        """What is certain not to stand at the end."""
        if self._is_fresh:
            text = text.lstrip()
            if not text:
                return ""
            self._is_fresh = False
        kept = text.rstrip()
        if not kept:
            if text:
                self._held.append(text)
            return ""
        if self._held:
            out = "".join(self._held) + kept
            self._held = []
        else:
            out = kept
        if len(kept) < len(text):
            self._held.append(text[len(kept) :])
        return out

    def cut(self) -> None:
        """An edge: what is held back is dropped, and what follows is trimmed at its start."""
        self._held = []
        self._is_fresh = True

    def flush(self) -> str:
        """What is held back, as text after all."""
        held, self._held = "".join(self._held), []
        return held


class MarkerFinder:
    """Looks for the first of several markers in text that comes in pieces."""

    __slots__ = ("_firsts", "_longest", "_pattern", "markers")

    def __init__(self, markers: Sequence[str]) -> None:
        """markers: none empty, none part of another (so that the leftmost complete one is the first)."""
        assert not any(one != other and one in other for one in markers for other in markers)
        self.markers = tuple(dict.fromkeys(markers))
        # Without markers: what never matches.
        self._pattern = re.compile("|".join(map(re.escape, self.markers)) or r"(?!)")
        self._firsts = frozenset(marker[0] for marker in self.markers)
        self._longest = max(map(len, self.markers), default=0)

    def find(self, text: str, start: int = 0) -> tuple[int, str]:
        """(position, marker) of the first marker from `start`; (-1, "") when there is none."""
        match = self._pattern.search(text, start)
        return (-1, "") if match is None else (match.start(), match[0])

    def undecided(self, text: str, start: int = 0) -> int:
        """Length of the longest end of `text` from `start` that may become a marker."""
        for begin in range(max(start, len(text) - self._longest + 1), len(text)):
            if text[begin] in self._firsts:
                rest = text[begin:]
                if any(marker.startswith(rest) for marker in self.markers):
                    return len(rest)
        return 0
