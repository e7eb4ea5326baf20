"""The machine under nearly every format: text outside, calls inside blocks between markers.

A format is data: its blocks, and for each what reads the calls in it. A call is given out as soon as it is certain to
be one: its name first, then its arguments as they are written, where the format writes them as JSON. Linear time: a
character is looked at a bounded number of times, whatever the pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from penstock.frontend.parsers.call_readers import CallReader, ReadCalls, WholeReader
from penstock.frontend.parsers.edges import EdgeTrimmer, MarkerFinder
from penstock.frontend.parsers.parts import CallStart, ParseWarning, Part, ToolSchemas, WarningKind, shortened

PREFIX_CHARS: Final = 64  # after so many characters a block that only looks like one is given up

ParseBlock = Callable[[str, ToolSchemas], list[Part] | None]


@dataclass(frozen=True, slots=True)
class Block:
    """Calls between two markers.

    open: what it begins with. close: what it ends with; "" for the end of the text, or where the next block begins.
    read: makes what reads the text between. prefix: set for a block that counts only at the very start of a message and
    whose `open` is part of what is read; without a match in its first PREFIX_CHARS it is content.
    """

    open: str
    close: str
    read: ReadCalls
    prefix: re.Pattern[str] | None = None


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls.

    signs: a chat template speaks this format when it holds every string of one of the tuples. dropped: markers around
    content that mean nothing to a reader. inner: markers inside blocks.
    """

    name: str
    signs: tuple[tuple[str, ...], ...]
    blocks: tuple[Block, ...]
    dropped: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()

    def is_spoken_by(self, template: str) -> bool:
        return any(all(sign in template for sign in signs) for signs in self.signs)

    @property
    def markers(self) -> frozenset[str]:
        """Everything that must reach the parser as text, also where it is a special token."""
        bounds = (marker for block in self.blocks if not block.prefix for marker in (block.open, block.close) if marker)
        return frozenset((*bounds, *self.dropped, *self.inner))


def read_whole(parse: ParseBlock) -> ReadCalls:
    """For calls in a form that can only be read as a whole."""
    return lambda schemas: WholeReader(lambda text: parse(text, schemas))


def split_calls(text: str, opening: str, parse_one: Callable[[str], list[Part] | None]) -> list[Part] | None:
    """The calls of a block in which each begins with `opening`; None where one is malformed, or text stands before."""
    head, *pieces = text.split(opening)
    found: list[Part] = []
    for piece in pieces:
        parts = parse_one(piece)
        if parts is None:
            return None
        found += parts
    return found if pieces and not head.strip() else None


@dataclass(slots=True)
class _Open:
    """The block that the text stands in. prefix_text: of one that has yet to show what it is; None once it has, or need
    not."""

    block: Block
    reader: CallReader
    name: str = ""  # of the last call given out
    prefix_text: str | None = None


class BlockParser:
    """Splits text into content and calls of one ToolFormat. White space around calls is not content.

    Two states: outside a block, text goes out but for a tail that may still become a marker, or white space that may
    stand before one; inside, the block's reader decides.
    """

    def __init__(self, tool_format: ToolFormat, schemas: ToolSchemas) -> None:
        """schemas: the tools of the request; a call of any other is given out with a warning."""
        self._schemas = schemas
        self._by_open = {block.open: block for block in tool_format.blocks if block.prefix is None}
        self._at_start = [block for block in tool_format.blocks if block.prefix is not None]
        self._opens = MarkerFinder((*self._by_open, *tool_format.dropped))
        self._closes = {close: MarkerFinder((close,)) for block in tool_format.blocks if (close := block.close)}
        self._closes[""] = MarkerFinder(tuple(self._by_open))
        self._content = EdgeTrimmer(trims_start=False)
        self._open: _Open | None = None
        self._tail = ""  # the end of the text so far, where it may become a marker

    def feed(self, text: str) -> list[Part]:
        found: list[Part] = []
        text = self._tail + text if self._tail else text
        self._tail = ""
        position = 0
        while position < len(text):
            if self._open is None:
                position = self._feed_outside(text, position, found)
            elif self._open.prefix_text is not None:
                text, position = self._feed_prefix(self._open, text, position)
            else:
                position = self._feed_inside(self._open, text, position, found)
        return found

    def finish(self) -> list[Part]:
        """A complete call without its closing marker counts: models stop there."""
        found: list[Part] = []
        tail, self._tail = self._tail, ""
        if self._open is not None and self._open.prefix_text is not None:
            begun, self._open.prefix_text = self._open.prefix_text, None
            found += self.feed(begun) if self._is_plausible(self._open, begun) else self._leave(begun)
            tail, self._tail = self._tail + tail, ""
        if self._open is None:
            self._add_content(tail, found)
        else:
            self._read(self._open, tail, found)
            self._end_block(found, "", "unfinished_tool_call")
        held = self._content.flush()
        if held:
            found.append(held)
        return found

    def _feed_outside(self, text: str, position: int, found: list[Part]) -> int:
        if self._at_start:
            return self._feed_start(text, position, found)
        start, marker = self._opens.find(text, position)
        if start < 0:
            cut = len(text) - self._opens.undecided(text, position)
            self._add_content(text[position:cut], found)
            self._tail = text[cut:]
            return len(text)
        self._add_content(text[position:start], found)
        if marker in self._by_open:
            self._begin(self._by_open[marker])
        else:
            self._content.cut()
        return start + len(marker)

    def _feed_start(self, text: str, position: int, found: list[Part]) -> int:
        """The first thing that is no white space decides whether the message begins with a block without a marker."""
        begun = len(text) - len(text[position:].lstrip())
        self._add_content(text[position:begun], found)
        if begun < len(text):
            block = next((block for block in self._at_start if text.startswith(block.open, begun)), None)
            self._at_start = []
            if block is not None:
                self._begin(block)
        return begun

    def _begin(self, block: Block) -> None:
        self._open = _Open(block, block.read(self._schemas), prefix_text=None if block.prefix is None else "")

    def _feed_prefix(self, opened: _Open, text: str, position: int) -> tuple[str, int]:
        """Holds what may be a block until that is clear; what goes on from there, and where."""
        begun = (opened.prefix_text or "") + text[position:]
        if len(begun) < PREFIX_CHARS:
            opened.prefix_text = begun
            return text, len(text)
        opened.prefix_text = None
        if not self._is_plausible(opened, begun):
            self._open = None  # it is content, and may hold other markers
        return begun, 0

    def _is_plausible(self, opened: _Open, begun: str) -> bool:
        assert opened.block.prefix is not None
        return opened.block.prefix.match(begun[:PREFIX_CHARS]) is not None

    def _leave(self, begun: str) -> list[Part]:
        self._open = None
        return self.feed(begun)

    def _feed_inside(self, opened: _Open, text: str, position: int, found: list[Part]) -> int:
        finder = self._closes[opened.block.close]
        start, marker = finder.find(text, position)
        if start < 0:
            cut = len(text) - finder.undecided(text, position)
            self._tail = text[cut:]
            self._read(opened, text[position:cut], found)
            return len(text)
        self._read(opened, text[position:start], found)
        if opened.block.close:
            self._end_block(found, marker, "malformed_tool_call")
            return start + len(marker)
        self._end_block(found, "", "malformed_tool_call")
        return start  # the next block begins

    def _read(self, opened: _Open, text: str, found: list[Part]) -> None:
        """Text of the block; behind the point where it broke, all of it is content."""
        reader = opened.reader
        if reader.is_broken:
            self._add_content(text, found)
        elif text and not self._give(opened, reader.feed(text), found):
            self._give_up(opened, "malformed_tool_call", found)

    def _end_block(self, found: list[Part], close: str, kind: WarningKind) -> None:
        opened, self._open = self._open, None
        assert opened is not None
        reader = opened.reader
        if not reader.is_broken:
            if self._give(opened, reader.finish(), found):
                self._content.cut()
                return
            self._give_up(opened, kind, found)
        if not opened.name:
            self._add_content(close, found)

    def _give(self, opened: _Open, parts: list[Part], found: list[Part]) -> bool:
        """Gives out what the reader just read; whether it goes on."""
        for part in parts:
            if isinstance(part, CallStart):
                self._content.cut()
                opened.name = part.name
                if self._schemas and part.name not in self._schemas:
                    found.append(ParseWarning("unknown_tool", shortened(part.name)))
            found.append(part)
        return not opened.reader.is_broken

    def _give_up(self, opened: _Open, kind: WarningKind, found: list[Part]) -> None:
        """What the reader has left is content; where it is the whole block, with its opening marker."""
        reader = opened.reader
        before = "" if opened.name or opened.block.prefix is not None else opened.block.open
        found.append(ParseWarning(kind, shortened(before + reader.rest[: reader.seen] or opened.name)))
        self._add_content(before + reader.rest, found)
        reader.rest = ""

    def _add_content(self, text: str, found: list[Part]) -> None:
        kept = self._content.feed(text) if text else ""
        if kept:
            found.append(kept)
