"""Reads the calls of a block while it is written: a call's name first, then its arguments as they come.

Owns: where in its block a reader stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from penstock.frontend.parsers.json_calls import ARGUMENT_KEYS, ID_KEYS, NAME_KEYS, json_text, object_text
from penstock.frontend.parsers.json_scanner import JsonScanner
from penstock.frontend.parsers.parts import CallArguments, CallEnd, CallStart, Part, ToolSchemas, whole_call

_BETWEEN: Final = re.compile(r"[\s,;\[\]]*")  # what may stand between objects, also of a list
_SPACE: Final = re.compile(r"[ \t\n\r]*")
MAX_HEAD_CHARS: Final = 1000  # a name and the markers around it are shorter


class CallReader(Protocol):
    """What becomes of the text between two markers.

    is_broken: it does not go on like calls. Then `rest` is the text that is not part of what was given out, and `seen`
    how much of it was read until then; neither depends on how the text was cut, but for what `rest` has at its end.
    """

    is_broken: bool
    rest: str
    seen: int

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now. Not to be called once broken."""
        ...

    def finish(self) -> list[Part]:
        """What the end of the block decides; it is broken if that leaves a call unfinished, or there was none."""
        ...


ReadCalls = Callable[[ToolSchemas], CallReader]  # makes the reader of a block


class _Held:
    """Text that was read and not given out."""

    __slots__ = ("_pieces", "num_chars")

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self.num_chars = 0

    def add(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self.num_chars += len(text)

    def take(self) -> str:
        text, self._pieces, self.num_chars = "".join(self._pieces), [], 0
        return text


class WholeReader:
    """Calls in a form that is read as a whole."""

    def __init__(self, parse: Callable[[str], list[Part] | None]) -> None:
        """parse: the parts of the calls of a whole block; None where it is malformed."""
        self._parse = parse
        self._held = _Held()
        self.is_broken, self.rest, self.seen = False, "", 0

    def feed(self, text: str) -> list[Part]:
        self._held.add(text)
        return []

    def finish(self) -> list[Part]:
        text = self._held.take()
        parts = self._parse(text)
        if parts is None:
            self.is_broken, self.rest, self.seen = True, text, len(text)
        return parts or []


class _ReaderWithArguments:
    """What the two readers share: arguments that are given out as the scanner passes them on."""

    def __init__(self) -> None:
        self._held = _Held()
        self._scanner: JsonScanner | None = None  # of the arguments that are being given out
        self._has_calls = False
        self.is_broken, self.rest, self.seen = False, "", 0

    def _start(self, call: CallStart, found: list[Part]) -> None:
        """The arguments of `call` are what comes next; what led to it is done with."""
        self._held.take()
        self._scanner, self._has_calls = JsonScanner(), True
        found.append(call)

    def _feed_arguments(self, scanner: JsonScanner, text: str, position: int, found: list[Part]) -> int:
        certain, position = scanner.feed(text, position)
        if certain:
            found.append(CallArguments(certain))
        if scanner.is_whole:
            self._scanner = None
            found.append(CallEnd())
        elif scanner.is_broken:
            self._end_broken(scanner, text[position:], found)
        return position

    def _end_broken(self, scanner: JsonScanner, rest: str, found: list[Part]) -> None:
        self._scanner = None
        found.append(CallEnd(is_complete=False))
        self.is_broken, self.rest, self.seen = True, scanner.held + rest, 0

    def _break(self, text: str, first: int, position: int, unread: int = 0) -> int:
        """Breaks at `position`, of which `unread` characters before it count as not read. first: of what is held."""
        held = self._held.take()
        self.is_broken, self.rest = True, held + text[first:]
        self.seen = len(held) + position - first - unread
        return len(text)


class JsonCallReader(_ReaderWithArguments):
    """Objects with name and arguments, under the names that models give these keys: one, a list, or several in a row.

    Arguments are given out as they come where the name stands before them; they may be an object, or a text that holds
    one. OpenAI's nesting, an object under "function", is read like its parent.
    """

    def __init__(
        self, schemas: ToolSchemas, *, names: Sequence[str] = NAME_KEYS, arguments: Sequence[str] = ARGUMENT_KEYS,
        hidden: Sequence[str] = (), is_bare: bool = False,
    ) -> None:  # fmt: skip
        """hidden: names of calls that are none to a reader. is_bare: there is no marker before it, so that an object
        without arguments is a call only where it names a tool.
        """
        super().__init__()
        self._schemas = schemas
        self._names, self._arguments, self._hidden = names, arguments, hidden
        self._is_bare = is_bare
        self._step = self._between
        self._value: JsonScanner | None = None  # of a key, or of a value that is no arguments in the giving
        self._text = _Held()  # what it has passed on
        self._depth = 0
        self._found: list[Part] = []  # by the feed in progress
        self._first = 0  # where in its text that begins which is not given out
        self._reset()

    def _reset(self) -> None:
        self._key, self._name, self._id = "", "", ""
        self._written: str | None = None  # arguments that came before their name, or as text
        self._is_given = False  # the object's call is out

    def feed(self, text: str) -> list[Part]:
        found = self._found = []
        position = self._first = 0
        while position < len(text) and not self.is_broken:
            if self._scanner is not None:
                position = self._first = self._feed_arguments(self._scanner, text, position, found)
                continue
            num_found = len(found)
            position = self._step(text, position)
            if len(found) > num_found:
                self._first = position
        if not self.is_broken and self._scanner is None:
            self._held.add(text[self._first :])
        return found

    def finish(self) -> list[Part]:
        found: list[Part] = []
        if self.is_broken:
            return found
        if self._scanner is not None:
            self._end_broken(self._scanner, "", found)
        elif not self._has_calls or (self._depth and not self._is_given):
            self._break("", 0, 0)
        return found

    def _between(self, text: str, position: int) -> int:
        match = _BETWEEN.match(text, position)
        assert match is not None
        position = match.end()
        if position == len(text):
            return position
        if text[position] != "{":
            return self._break(text, self._first, position)
        self._reset()
        self._depth, self._step = 1, self._before_key
        return position + 1

    def _before_key(self, text: str, position: int) -> int:
        position = _skip(text, position)
        if position == len(text):
            return position
        if text[position] == "}" and not self._key:
            return self._end_object(text, position)
        if text[position] != '"':
            return self._break(text, self._first, position)
        self._value, self._step = JsonScanner(), self._in_key
        return position

    def _in_key(self, text: str, position: int) -> int:
        position = self._scan(text, position)
        if self._value is not None and self._value.is_whole:
            self._key = json_text(self._text.take()) or "-"  # not empty: it also says that there was one
            self._value, self._step = None, self._before_value
        return position

    def _before_value(self, text: str, position: int) -> int:
        position = _skip(text, position)
        if position == len(text):
            return position
        if text[position] != ":":
            return self._break(text, self._first, position)
        self._step = self._at_value
        return position + 1

    def _at_value(self, text: str, position: int) -> int:
        position = _skip(text, position)
        if position == len(text):
            return position
        is_object = text[position] == "{"
        if is_object and self._key == "function" and self._depth == 1:
            self._key, self._depth, self._step = "", 2, self._before_key
            return position + 1
        if is_object and self._is_arguments() and self._name and self._name not in self._hidden:
            self._start(CallStart(self._name, self._id), self._found)
            self._is_given, self._step = True, self._after_value
            return position
        self._value, self._step = JsonScanner(), self._in_value
        return position

    def _in_value(self, text: str, position: int) -> int:
        position = self._scan(text, position)
        if self._value is not None and self._value.is_whole:
            self._value, self._step = None, self._after_value
            if not self._take_value(self._text.take()):
                return self._break(text, self._first, position)
        return position

    def _after_value(self, text: str, position: int) -> int:
        position = _skip(text, position)
        if position == len(text):
            return position
        if text[position] == ",":
            self._step = self._before_key
            return position + 1
        if text[position] == "}":
            return self._end_object(text, position)
        return self._break(text, self._first, position)

    def _scan(self, text: str, position: int) -> int:
        assert self._value is not None
        certain, position = self._value.feed(text, position)
        self._text.add(certain)
        if self._value.is_broken:
            return self._break(text, self._first, position, unread=len(self._value.held))
        return position

    def _is_arguments(self) -> bool:
        return self._key in self._arguments and self._written is None and not self._is_given

    def _take_value(self, value: str) -> bool:
        """Keeps a member that counts; whether it is what it has to be."""
        if self._key in self._names and not self._name:
            self._name = json_text(value) or ""
            return bool(self._name)
        if self._key in ID_KEYS and not self._id:
            self._id = json_text(value) or ""
        elif self._is_arguments():
            self._written = object_text(value)
            return self._written is not None
        return True

    def _end_object(self, text: str, position: int) -> int:
        self._depth -= 1
        self._key, self._step = "-", self._after_value
        if self._depth:
            return position + 1
        self._step = self._between
        if not self._is_given:
            is_call = self._written is not None or not self._is_bare or self._name in self._schemas
            if not self._name or not is_call:
                return self._break(text, self._first, position)
            self._has_calls = self._is_given = True
            if self._name not in self._hidden:
                self._found += whole_call(self._name, self._written or "{}", self._id)
                self._held.take()
        return position + 1


# (text, whether it is the end of the block instead of standing before a brace) -> the calls in it; the last one's
# arguments follow, unless it is the end, and the others have none. None where it is malformed.
ParseHead = Callable[[str, bool], list[CallStart] | None]


class NamedCallReader(_ReaderWithArguments):
    """Calls whose arguments stand behind a head that names them: everything before a brace."""

    def __init__(self, parse_head: ParseHead) -> None:
        super().__init__()
        self._parse_head = parse_head

    def feed(self, text: str) -> list[Part]:
        found: list[Part] = []
        position = 0
        while position < len(text) and not self.is_broken:
            if self._scanner is not None:
                position = self._feed_arguments(self._scanner, text, position, found)
                continue
            brace = text.find("{", position)
            end = brace if brace >= 0 else len(text)
            room = MAX_HEAD_CHARS - self._held.num_chars
            if end - position > room:
                position = self._break(text, position, position + room)
            elif brace < 0:
                self._held.add(text[position:])
                position = end
            else:
                position = self._read_head(text, position, brace, found)
        return found

    def finish(self) -> list[Part]:
        found: list[Part] = []
        if self._scanner is not None:
            self._end_broken(self._scanner, "", found)
        elif not self.is_broken:
            head = self._held.take()
            calls = self._parse_head(head, True)
            if calls is None or not (calls or self._has_calls):
                self.is_broken, self.rest, self.seen = True, head, len(head)
            for call in calls or ():
                found += whole_call(call.name, "{}", call.call_id)
        return found

    def _read_head(self, text: str, first: int, brace: int, found: list[Part]) -> int:
        head = self._held.take() + text[first:brace]
        calls = self._parse_head(head, False)
        if not calls:
            self.is_broken, self.rest, self.seen = True, head + text[brace:], len(head)
            return len(text)
        for call in calls[:-1]:
            found += whole_call(call.name, "{}", call.call_id)
        self._start(calls[-1], found)
        return brace


class FirstCharacterReader:
    """Leaves the reading to one of several, by the first character that is no white space."""

    def __init__(self, choose: Callable[[str], CallReader]) -> None:
        self._choose = choose
        self._chosen: CallReader | None = None
        self._space = _Held()
        self.is_broken, self.rest, self.seen = False, "", 0

    def feed(self, text: str) -> list[Part]:
        if self._chosen is None:
            if text.isspace():
                self._space.add(text)
                return []
            text = self._space.take() + text
            self._chosen = self._choose(text.lstrip()[0])
        return self._noted(self._chosen, self._chosen.feed(text))

    def finish(self) -> list[Part]:
        if self._chosen is not None:
            return self._noted(self._chosen, self._chosen.finish())
        self.is_broken, self.rest = True, self._space.take()
        return []

    def _noted(self, chosen: CallReader, parts: list[Part]) -> list[Part]:
        self.is_broken, self.rest, self.seen = chosen.is_broken, chosen.rest, chosen.seen
        return parts


def parse_marked_heads(
    head: str, opening: str, closing: str, parse_one: Callable[[str], CallStart | None], *, is_end: bool
) -> list[CallStart] | None:
    """A ParseHead for calls between two markers. parse_one: the call whose arguments follow this text."""
    before, *pieces = head.split(opening)
    if before.replace("```", "").strip() not in ("", closing):
        return None
    calls: list[CallStart] = []
    for index, piece in enumerate(pieces):
        text, ending, after = piece.partition(closing)
        has_arguments = index == len(pieces) - 1 and not is_end
        call = parse_one(text)
        if call is None or after.strip() or bool(ending) is has_arguments:
            return None
        calls.append(call)
    return calls


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()
