"""Checks a JSON value while it is written, so that its text can be passed on before it is whole.

Owns: where in the value the text so far stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

from penstock.messages.bounds import MAX_JSON_DEPTH

MAX_SCALAR_CHARS: Final = 400  # of a number: what every reader of JSON takes
_STRING_RUN: Final = re.compile(r'[^"\\\x00-\x1f]*')
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_SCALAR_RUN: Final = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_ESCAPE: Final = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_BEGUN: Final = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")


class _State(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()  # behind [
    KEY = auto()
    KEY_OR_END = auto()  # behind {
    COLON = auto()
    AFTER = auto()  # behind a member or an item
    STRING = auto()
    KEY_STRING = auto()
    ESCAPE = auto()
    SCALAR = auto()


_HELD_STATES: Final = (_State.ESCAPE, _State.SCALAR)


class JsonScanner:
    """One value. `is_whole` once it is complete, `is_broken` once no text can complete it any more.

    What `feed` passes on is always the beginning of valid JSON, and never ends inside a number, a literal or an escape.
    held: what was looked at and not passed on. Linear time: a character is looked at a bounded number of times.
    """

    __slots__ = ("_back", "_closers", "_state", "held", "is_broken", "is_whole", "last_whole")

    def __init__(self) -> None:
        self._closers: list[str] = []  # brackets that are still due
        self._state = _State.VALUE
        self._back = _State.STRING  # where an escape returns to
        self.held = ""
        self.is_whole = False
        self.is_broken = False
        self.last_whole = 0  # in the text fed: behind the last value that is complete, or bracket that opens

    @property
    def closers(self) -> str:
        """The brackets that are missing behind `last_whole`."""
        return "".join(reversed(self._closers))

    def feed(self, text: str, start: int = 0) -> tuple[str, int]:
        """(text that is certain to belong to the value, position behind what was looked at).

        When it breaks, what does not fit is `held` and the text from that position on.
        """
        held, position, certain = self.held, start, -1
        size = len(text)
        while position < size and not self.is_whole and not self.is_broken:
            was_held = self._state in _HELD_STATES
            position = self._STEPS[self._state](self, text, position)
            is_held = self._state in _HELD_STATES
            if not is_held or not (was_held or self.is_broken):
                certain, self.held = position, ""
        if certain < 0:
            if not self.is_broken:
                self.held = held + text[start:position]
            return "", position
        if not self.is_broken:
            self.held = text[certain:position]
        return held + text[start:certain], position

    def _value(self, text: str, position: int) -> int:
        position = self._skip(text, position)
        if position == len(text):
            return position
        character = text[position]
        if character == "]" and self._state is _State.VALUE_OR_END:
            return self._close(character, position)
        if character == '"':
            self._state = _State.STRING
        elif character in "{[":
            self._closers.append("}" if character == "{" else "]")
            self.is_broken = len(self._closers) > MAX_JSON_DEPTH
            self.last_whole = position + 1
            self._state = _State.KEY_OR_END if character == "{" else _State.VALUE_OR_END
        elif character in "-0123456789tfn":
            self._state = _State.SCALAR
            return position
        else:
            self.is_broken = True
        return position if self.is_broken else position + 1

    def _key(self, text: str, position: int) -> int:
        position = self._skip(text, position)
        if position == len(text):
            return position
        if text[position] == "}" and self._state is _State.KEY_OR_END:
            return self._close("}", position)
        return self._expect('"', _State.KEY_STRING, text, position)

    def _colon(self, text: str, position: int) -> int:
        return self._expect(":", _State.VALUE, text, self._skip(text, position))

    def _after(self, text: str, position: int) -> int:
        position = self._skip(text, position)
        if position == len(text):
            return position
        if text[position] == ",":
            self._state = _State.KEY if self._closers[-1] == "}" else _State.VALUE
            return position + 1
        return self._close(text[position], position)

    def _string(self, text: str, position: int) -> int:
        match = _STRING_RUN.match(text, position)
        assert match is not None
        position = match.end()
        if position == len(text):
            return position
        if text[position] == '"':
            if self._state is _State.KEY_STRING:
                self._state = _State.COLON
            else:
                self._end_value(position + 1)
            return position + 1
        if text[position] == "\\":
            self._back, self._state = self._state, _State.ESCAPE
            return position
        self.is_broken = True  # a control character
        return position

    def _escape(self, text: str, position: int) -> int:
        so_far = self.held + text[position : position + 6 - len(self.held)]
        match = _ESCAPE.match(so_far)
        if match is not None:
            self._state = self._back
            return position + match.end() - len(self.held)
        if not _ESCAPE_BEGUN.fullmatch(so_far):
            self.is_broken = True
            return position
        return position + len(so_far) - len(self.held)

    def _scalar(self, text: str, position: int) -> int:
        match = _SCALAR_RUN.match(text, position)
        assert match is not None
        num_chars = len(self.held) + match.end() - position
        if num_chars > MAX_SCALAR_CHARS:
            self.is_broken = True
        elif match.end() < len(text):
            if _SCALAR.fullmatch(self.held + match[0]):
                self._end_value(match.end())
                return match.end()
            self.is_broken = True
        return position if self.is_broken else match.end()

    def _skip(self, text: str, position: int) -> int:
        match = _SPACE.match(text, position)
        assert match is not None
        return match.end()

    def _expect(self, character: str, state: _State, text: str, position: int) -> int:
        if position == len(text):
            return position
        if text[position] != character:
            self.is_broken = True
            return position
        self._state = state
        return position + 1

    def _close(self, character: str, position: int) -> int:
        if self._closers[-1] != character:
            self.is_broken = True
            return position
        self._closers.pop()
        self._end_value(position + 1)
        return position + 1

    def _end_value(self, position: int) -> None:
        self._state = _State.AFTER
        self.is_whole = not self._closers
        self.last_whole = position

    _STEPS: Final[dict[_State, Callable[[JsonScanner, str, int], int]]] = {
        _State.VALUE: _value,
        _State.VALUE_OR_END: _value,
        _State.KEY: _key,
        _State.KEY_OR_END: _key,
        _State.COLON: _colon,
        _State.AFTER: _after,
        _State.STRING: _string,
        _State.KEY_STRING: _string,
        _State.ESCAPE: _escape,
        _State.SCALAR: _scalar,
    }


def completed_object(text: str) -> str:
    """The JSON object that begins as `text` does, cut behind its last complete value; "{}" where there is none."""
    scanner = JsonScanner()
    scanner.feed(text)
    return text[: scanner.last_whole] + scanner.closers if scanner.last_whole else "{}"
