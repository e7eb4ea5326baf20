"""What a model thought before it answered, split from the answer: `<think>...</think>` and its relatives.

Thinking counts at the beginning of a message only: further on, the tags are what the model writes about. Some templates
put the opening tag into the prompt, so that the output begins inside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from penstock.frontend.parsers.edges import EdgeTrimmer, MarkerFinder
from penstock.frontend.parsers.parts import Part, PartParser, Reasoning


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    open: str
    close: str

    @classmethod
    def of_template(cls, template: str) -> ReasoningTags | None:
        """The tags that a chat template knows."""
        return next((tags for tags in _KNOWN if tags.open in template or tags.close in template), None)

    def is_open_in(self, opening: str) -> bool:
        """Whether the prompt's own end leaves the model inside. opening: what the template wrote last."""
        return opening.rfind(self.open) > opening.rfind(self.close)


_KNOWN: Final = (
    ReasoningTags("<think>", "</think>"),
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningTags("<|channel>thought", "<channel|>"),
    ReasoningTags("<seed:think>", "</seed:think>"),
    ReasoningTags("◁think▷", "◁/think▷"),
    ReasoningTags("<thought>", "</thought>"),
    ReasoningTags("<reasoning>", "</reasoning>"),
)


class ReasoningParser:
    """Splits reasoning off and hands the rest to another parser, or gives it out as content."""

    def __init__(self, tags: ReasoningTags, inner: PartParser | None, *, is_inside: bool) -> None:
        self._open = tags.open
        self._close = MarkerFinder((tags.close,))
        self._inner = inner
        self._state = "inside" if is_inside else "before"
        self._reasoning = EdgeTrimmer(trims_start=True)
        self._is_edge = False  # right behind the closing tag, where white space is no content
        self._before: list[str] = []  # white space before a tag that may come
        self._tail = ""

    def feed(self, text: str) -> list[Part]:
        if self._state == "after":
            return self._feed_after(text)
        found: list[Part] = []
        rest = self._tail + text if self._tail else text
        self._tail = ""
        if self._state == "before":
            rest = self._feed_before(rest)
        if self._state == "inside" and rest:
            rest = self._feed_inside(rest, found)
        if self._state == "after" and rest:
            found += self._feed_after(rest)
        return found

    def finish(self) -> list[Part]:
        found: list[Part] = []
        tail, self._tail = self._tail, ""
        if self._state == "inside":
            self._add(self._reasoning.feed(tail), found)
        elif self._state == "before":
            found += self._feed_after("".join(self._before) + tail)
        if self._inner is not None:
            found += self._inner.finish()
        return found

    def _feed_before(self, text: str) -> str:
        begun = text.lstrip()
        if len(begun) < len(self._open) and self._open.startswith(begun):
            space = text[: len(text) - len(begun)]
            if space:
                self._before.append(space)
            self._tail = begun
            return ""
        if begun.startswith(self._open):
            self._state = "inside"
            return begun[len(self._open) :]
        self._state = "after"
        return "".join((*self._before, text))

    def _feed_inside(self, text: str, found: list[Part]) -> str:
        start, marker = self._close.find(text)
        if start < 0:
            cut = len(text) - self._close.undecided(text)
            self._add(self._reasoning.feed(text[:cut]), found)
            self._tail = text[cut:]
            return ""
        self._add(self._reasoning.feed(text[:start]), found)
        self._state, self._is_edge = "after", True
        return text[start + len(marker) :]

    def _feed_after(self, text: str) -> list[Part]:
        if self._is_edge:
            text = text.lstrip()
            if not text:
                return []
            self._is_edge = False
        if self._inner is not None:
            return self._inner.feed(text)
        return [text] if text else []

    def _add(self, text: str, found: list[Part]) -> None:
        if text:
            found.append(Reasoning(text))


def tags_of(templates: Iterable[str]) -> ReasoningTags | None:
    """The tags of the first template that knows any."""
    return next((tags for tags in map(ReasoningTags.of_template, templates) if tags is not None), None)
