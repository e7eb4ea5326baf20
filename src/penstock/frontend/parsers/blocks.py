"""The machine under nearly every format: text outside, calls inside blocks between markers.

A format is data: its blocks, and for each the pure function that reads the calls out of a whole block. A call is given
out when its block is complete, so a client never holds half a call that turns out to be none. Linear time: a character
is looked at a bounded number of times, whatever the pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from penstock.frontend.parsers.edges import EdgeTrimmer, MarkerFinder
from penstock.frontend.parsers.parts import ParseWarning, Part, ToolCall, ToolSchemas, shortened

PREFIX_CHARS: Final = 64  # after so many characters a block that only looks like one is given up

ParseBlock = Callable[[str, ToolSchemas], list[ToolCall] | None]


@dataclass(frozen=True, slots=True)
class Block:
    """Calls between two markers.

    open: what it begins with. close: what it ends with; "" for the end of the text. parse: the calls in the text
    between, None where it is malformed. prefix: set for a block that counts only at the very start of a message and
    whose `open` is part of what `parse` reads; without a match in its first PREFIX_CHARS it is content.
    """

    open: str
    close: str
    parse: ParseBlock
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


def split_calls(text: str, opening: str, parse_one: Callable[[str], ToolCall | None]) -> list[ToolCall] | None:
    """The calls of a block in which each begins with `opening`; None where one is malformed, or text stands before."""
    head, *pieces = text.split(opening)
    calls = [parse_one(piece) for piece in pieces]
    known = [call for call in calls if call is not None]
    return known if known and len(known) == len(calls) and not head.strip() else None


class BlockParser:
    """Splits text into content and calls of one ToolFormat. White space around calls is not content.

    Two states: outside a block, text goes out but for a tail that may still become a marker, or white space that may
    stand before one; inside, everything is held until the closing marker or the end.
    """

    def __init__(self, tool_format: ToolFormat, schemas: ToolSchemas) -> None:
        """schemas: the tools of the request; a call of any other is given out with a warning."""
        self._schemas = schemas
        self._by_open = {block.open: block for block in tool_format.blocks if block.prefix is None}
        self._at_start = [block for block in tool_format.blocks if block.prefix is not None]
        self._opens = MarkerFinder((*self._by_open, *tool_format.dropped))
        closes = {block.close for block in tool_format.blocks}
        self._closes = {close: MarkerFinder((close,) if close else ()) for close in closes}
        self._content = EdgeTrimmer(trims_start=False)
        self._block: Block | None = None
        self._held: list[str] = []  # the block's text so far
        self._num_held = 0
        self._is_plausible = True  # the block at the start has passed its prefix test, or has yet to
        self._tail = ""  # the end of the text so far, where it may become a marker

    def feed(self, text: str) -> list[Part]:
        found: list[Part] = []
        rest = self._tail + text if self._tail else text
        self._tail = ""
        while rest:
            rest = (
                self._feed_outside(rest, found) if self._block is None else self._feed_inside(self._block, rest, found)
            )
        return found

    def finish(self) -> list[Part]:
        """A complete call without its closing marker counts: models stop there."""
        found: list[Part] = []
        if self._block is not None and self._block.prefix is not None:
            inner = "".join(self._held)
            if not self._block.prefix.match(inner[:PREFIX_CHARS]):
                self._block = None
                found += self.feed(inner)
        tail, self._tail = self._tail, ""
        if self._block is None:
            self._add_content(tail, found)
        else:
            self._end_block(self._block, "".join((*self._held, tail)), "", found)
        held = self._content.flush()
        if held:
            found.append(held)
        return found

    def _feed_outside(self, text: str, found: list[Part]) -> str:
        if self._at_start:
            begun = text.lstrip()
            self._add_content(text[: len(text) - len(begun)], found)
            if not begun:
                return ""
            block = next((block for block in self._at_start if begun.startswith(block.open)), None)
            self._at_start = []
            if block is not None:
                self._begin(block)
            return begun
        start, marker = self._opens.find(text)
        if start < 0:
            cut = len(text) - self._opens.undecided(text)
            self._add_content(text[:cut], found)
            self._tail = text[cut:]
            return ""
        self._add_content(text[:start], found)
        if marker in self._by_open:
            self._begin(self._by_open[marker])
        else:
            self._content.cut()
        return text[start + len(marker) :]

    def _begin(self, block: Block) -> None:
        self._block, self._held, self._num_held = block, [], 0
        self._is_plausible = block.prefix is None

    def _feed_inside(self, block: Block, text: str, found: list[Part]) -> str:
        finder = self._closes[block.close]
        start, _ = finder.find(text)
        if start >= 0:
            self._held.append(text[:start])
            self._end_block(block, "".join(self._held), block.close, found)
            return text[start + len(block.close) :]
        cut = len(text) - finder.undecided(text)
        self._held.append(text[:cut])
        self._num_held += cut
        self._tail = text[cut:]
        if self._is_plausible or self._num_held < PREFIX_CHARS:
            return ""
        assert block.prefix is not None
        inner = "".join(self._held)
        self._is_plausible = bool(block.prefix.match(inner[:PREFIX_CHARS]))
        if self._is_plausible:
            return ""
        self._block, self._tail = None, ""  # what began like a block is content, and may hold other markers
        return inner + text[cut:]

    def _end_block(self, block: Block, inner: str, close: str, found: list[Part]) -> None:
        self._block = None
        calls = block.parse(inner, self._schemas)
        if calls is not None:
            self._content.cut()
            for call in calls:
                if self._schemas and call.name not in self._schemas:
                    found.append(ParseWarning("unknown_tool", shortened(call.name)))
                found.append(call)
            return
        whole = inner if block.prefix is not None else block.open + inner + close
        found.append(ParseWarning("malformed_tool_call" if close else "unfinished_tool_call", shortened(whole)))
        self._add_content(whole, found)

    def _add_content(self, text: str, found: list[Part]) -> None:
        kept = self._content.feed(text) if text else ""
        if kept:
            found.append(kept)
