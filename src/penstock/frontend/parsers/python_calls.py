"""Reads Python calls with literal keyword arguments, `f(a=1, b="x")`. Nothing is compiled or evaluated."""

from __future__ import annotations

import ast
import re
from typing import Any, Final

from penstock.frontend.parsers.cursor import Cursor
from penstock.frontend.parsers.json_calls import object_json
from penstock.frontend.parsers.parts import Part, whole_call

_SPACE: Final = re.compile(r"(?:\s|\\\n|#[^\n]*)*")
_NAME: Final = re.compile(r"[^\W\d][\w.\-]*")
_KEY: Final = re.compile(r"[^\W\d]\w*")
_STRING: Final = re.compile(
    r'[uUrR]?(?:"""(?:[^"\\]|\\.|"(?!""))*+"""|' + r"'''(?:[^'\\]|\\.|'(?!''))*+'''|"
    r'"(?:[^"\\\n]|\\.)*+"|' + r"'(?:[^'\\\n]|\\.)*+')",
    re.DOTALL,
)
_NUMBER: Final = re.compile(r"[-+]?(?:0[xXoObB][0-9a-fA-F_]+|[0-9._]+(?:[eE][-+]?[0-9_]+)?)")
_WORDS: Final = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_MAX_DEPTH: Final = 64
_MAX_NUMBER_CHARS: Final = 400


def read_python_calls(text: str) -> list[Part] | None:
    """The calls of a list of calls, or of calls one below the other; None where it is anything else."""
    reader = _Reader(text)
    try:
        return reader.read()
    except ValueError:
        return None


class _Reader(Cursor):
    """One pass over the text. Raises ValueError where it is malformed."""

    space = _SPACE

    def read(self) -> list[Part]:
        found: list[Part] = []
        while not self._is_at_end():
            if self._takes("["):
                while not self._takes("]"):
                    found += self._call()
                    if not self._takes(","):
                        self._expect("]")
                        break
            else:
                found += self._call()
            while self._takes(";") or self._takes(","):
                pass
        if not found:
            raise ValueError("no call")
        return found

    def _call(self) -> list[Part]:
        name = self._match(_NAME)
        values: dict[str, Any] = {}
        self._expect("(")
        while not self._takes(")"):
            key = self._match(_KEY)
            self._expect("=")
            if key in values:
                raise ValueError("a keyword stands twice")
            values[key] = self._value(1)
            if not self._takes(","):
                self._expect(")")
                break
        arguments = object_json(values)
        if arguments is None:
            raise ValueError("arguments that JSON cannot hold")
        return whole_call(name, arguments)

    def _value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        if self._takes("["):
            return self._items("]", depth)
        if self._takes("("):
            return self._tuple(depth)
        if self._takes("{"):
            return self._members(depth)
        if (text := self._strings()) is not None:
            return text
        if (number := _NUMBER.match(self._text, self._position)) is not None:
            if len(number[0]) > _MAX_NUMBER_CHARS:
                raise ValueError("a number that is too long")
            self._position = number.end()
            return _literal(number[0])
        word = self._match(_KEY)
        if word not in _WORDS:
            raise ValueError("not a literal")
        return _WORDS[word]

    def _items(self, end: str, depth: int) -> list[Any]:
        items: list[Any] = []
        while not self._takes(end):
            items.append(self._value(depth + 1))
            if not self._takes(","):
                self._expect(end)
                break
        return items

    def _tuple(self, depth: int) -> Any:
        """A tuple, or a value in brackets."""
        start = self._position
        items = self._items(")", depth)
        is_tuple = len(items) != 1 or self._text[start : self._position - 1].rstrip().endswith(",")
        return items if is_tuple else items[0]

    def _members(self, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        while not self._takes("}"):
            key = self._strings()
            if key is None:
                raise ValueError("not a JSON key")
            self._expect(":")
            members[key] = self._value(depth + 1)
            if not self._takes(","):
                self._expect("}")
                break
        return members

    def _strings(self) -> str | None:
        """A string, or several side by side, which are one."""
        pieces: list[str] = []
        while True:
            self._skip_space()
            match = _STRING.match(self._text, self._position)
            if match is None:
                return "".join(pieces) if pieces else None
            self._position = match.end()
            pieces.append(str(_literal(match[0])))

    def _match(self, pattern: re.Pattern[str]) -> str:
        self._skip_space()
        match = pattern.match(self._text, self._position)
        if match is None:
            raise ValueError("something else was expected")
        self._position = match.end()
        return match[0]


def _literal(token: str) -> Any:
    """The value of one string or number as Python writes it. Raises ValueError."""
    try:
        value = ast.literal_eval(token)
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("not a literal") from error
    if isinstance(value, float) and value - value != 0.0:
        raise ValueError("no JSON number")
    return value
