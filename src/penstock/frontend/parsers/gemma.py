"""FunctionGemma and Gemma 4: `call:NAME{key:value, ...}` with bare keys and text between escape markers."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from penstock.frontend.parsers.blocks import Block, ToolFormat, read_whole
from penstock.frontend.parsers.json_calls import object_json
from penstock.frontend.parsers.parts import Part, ToolSchemas, whole_call

_QUOTES: Final = ("<escape>", '<|"|>')
_MAX_DEPTH: Final = 64


def parse(text: str, schemas: ToolSchemas) -> list[Part] | None:  # noqa: ARG001 - a ParseBlock
    stripped = text.strip()
    name, mark, _ = stripped.partition("{")
    if not stripped.startswith("call:") or not mark:
        return None
    reader = _Reader(stripped, len(name))
    try:
        values = reader.read_object(0)
    except ValueError:
        return None
    arguments = object_json(values)
    name = name.removeprefix("call:").strip()
    return whole_call(name, arguments) if name and arguments is not None and reader.is_done else None


class _Reader:
    """One pass over the text from `position`. Raises ValueError where it is malformed."""

    def __init__(self, text: str, position: int) -> None:
        self._text = text
        self._position = position

    @property
    def is_done(self) -> bool:
        return self._position == len(self._text)

    def read_object(self, depth: int) -> dict[str, Any]:
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
            return self.read_object(depth)
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

    def _takes(self, character: str) -> bool:
        self._skip_space()
        if self._text.startswith(character, self._position):
            self._position += 1
            return True
        return False

    def _expect(self, character: str) -> None:
        if not self._takes(character):
            raise ValueError(f"{character} is missing")

    def _skip_space(self) -> None:
        while self._text[self._position : self._position + 1].isspace():
            self._position += 1


FORMAT = ToolFormat(
    "gemma",
    (("<start_function_call>",), ("<|tool_call>", "<tool_call|>")),
    (
        Block("<start_function_call>", "<end_function_call>", read_whole(parse)),
        Block("<|tool_call>", "<tool_call|>", read_whole(parse)),
    ),
    inner=_QUOTES,
)
