"""FunctionGemma and Gemma 4: `call:NAME{key:value, ...}` with bare keys and text between escape markers."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from penstock.frontend.parsers.blocks import Block, ToolFormat, read_whole
from penstock.frontend.parsers.cursor import Cursor
from penstock.frontend.parsers.json_calls import object_json
from penstock.frontend.parsers.parts import Part, ToolSchemas, whole_call

_QUOTES: Final = ("<escape>", '<|"|>')
_MAX_DEPTH: Final = 64


def parse(text: str, _schemas: ToolSchemas) -> list[Part] | None:
    stripped = text.strip()
    name, mark, _ = stripped.partition("{")
    if not stripped.startswith("call:") or not mark:
        return None
    try:
        values = _Reader(stripped, len(name)).read()
    except ValueError:
        return None
    arguments = object_json(values)
    name = name.removeprefix("call:").strip()
    return whole_call(name, arguments) if name and arguments is not None else None


class _Reader(Cursor):
    """One pass over the text from `position`. Raises ValueError where it is malformed."""

    def read(self) -> dict[str, Any]:
        values = self._object(0)
        if not self._is_at_end():
            raise ValueError("more than an object")
        return values

    def _object(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        self._expect("{")
        while not self._takes("}"):
            if values:
                self._expect(",")
            key = self._quoted()
            if key is None:
                key = self._until(":")
            self._expect(":")
            values[key.strip()] = self._value(depth + 1)
        return values

    def _list(self, depth: int) -> list[Any]:
        items: list[Any] = []
        self._expect("[")
        while not self._takes("]"):
            if items:
                self._expect(",")
            items.append(self._value(depth + 1))
        return items

    def _value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        self._skip_space()
        quoted = self._quoted()
        if quoted is not None:
            return quoted
        if self._text.startswith("{", self._position):
            return self._object(depth)
        if self._text.startswith("[", self._position):
            return self._list(depth)
        bare = self._until(",}]").strip()
        try:
            return msgspec.json.decode(bare.encode())
        except msgspec.MsgspecError:
            if not bare:
                raise ValueError("a value is missing") from None
            return bare

    def _quoted(self) -> str | None:
        self._skip_space()
        for quote in _QUOTES:
            if self._text.startswith(quote, self._position):
                start = self._position + len(quote)
                end = self._text.index(quote, start)
                self._position = end + len(quote)
                return self._text[start:end]
        return None

    def _until(self, ends: str) -> str:
        start = self._position
        while self._position < len(self._text) and self._text[self._position] not in ends:
            self._position += 1
        return self._text[start : self._position]


FORMAT = ToolFormat(
    "gemma",
    (("<start_function_call>",), ("<|tool_call>", "<tool_call|>")),
    (
        Block("<start_function_call>", "<end_function_call>", read_whole(parse)),
        Block("<|tool_call>", "<tool_call|>", read_whole(parse)),
    ),
    inner=_QUOTES,
)
