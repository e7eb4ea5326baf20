"""A place in a text that is read once from left to right."""

from __future__ import annotations

import re
from typing import Final

_SPACE: Final = re.compile(r"\s*")


class Cursor:
    """Readers of formats derive from it. Methods skip white space first; ValueError where the text is malformed."""

    space: re.Pattern[str] = _SPACE  # matches also nothing

    def __init__(self, text: str, position: int = 0) -> None:
        self._text = text
        self._position = position

    def _takes(self, character: str) -> bool:
        self._skip_space()
        if self._text.startswith(character, self._position):
            self._position += 1
            return True
        return False

    def _expect(self, character: str) -> None:
        if not self._takes(character):
            raise ValueError(f"{character} is missing")

    def _is_at_end(self) -> bool:
        self._skip_space()
        return self._position == len(self._text)

    def _skip_space(self) -> None:
        match = self.space.match(self._text, self._position)
        assert match is not None
        self._position = match.end()
