"""Strings that remember which of their characters came from a user.

`TracedText` is a `str` in every respect a chat template can see; beside its text it carries the ranges of characters
that a request supplied. Whatever a template does with it (slices, splits, strips, joins), the result is traced again.
An operation that cannot be followed character by character marks its whole result as the user's: that errs on the
safe side, since text marked as the user's can never become a control token.
Never: changes what an operation returns as text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, SupportsIndex

from jinja2 import Environment
from jinja2.exceptions import SecurityError
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, Undefined

Spans = tuple[tuple[int, int], ...]  # ascending, disjoint, non-empty [start, end) ranges of characters


# Values that hold no user text, or that only pass through a call as its surroundings.
_WITHOUT_TEXT: Final = (int, float, range, Undefined, Context, EvalContext, Environment)


class TracedText(str):
    """A string with the ranges of it that a user supplied. Build with `traced()` or `user_text()`."""

    __slots__ = ("_spans",)
    _spans: Spans

    def __str__(self) -> str:
        return self  # jinja wraps every output in str(): the default would drop the ranges

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        text = str.__getitem__(self, key)
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return _cut(self, text, start, stop) if step == 1 else _marked(text, self)
        start = range(len(self))[key]
        return _cut(self, text, start, start + 1)

    def __add__(self, other: object) -> str:
        return join_text((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: object) -> str:
        return join_text((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> str:
        return join_text((self,) * int(count))

    __rmul__ = __mul__

    def __mod__(self, values: object) -> str:
        return _marked(str.__mod__(plain(self), values), self, values)

    def __rmod__(self, template: object) -> str:
        return _marked(str.__mod__(template, self), template, self) if isinstance(template, str) else NotImplemented

    def __format__(self, spec: str) -> str:
        return _marked(str.__format__(self, spec), self)

    # Methods that cut: the text says how much went from each end.
    def lstrip(self, chars: str | None = None) -> str:
        text = str.lstrip(self, chars)
        return _cut(self, text, len(self) - len(text), len(self))

    def rstrip(self, chars: str | None = None) -> str:
        text = str.rstrip(self, chars)
        return _cut(self, text, 0, len(text))

    def strip(self, chars: str | None = None) -> str:
        start = len(self) - len(str.lstrip(self, chars))
        text = str.strip(self, chars)
        return _cut(self, text, start, start + len(text))

    def removeprefix(self, prefix: str, /) -> str:
        text = str.removeprefix(self, prefix)
        return _cut(self, text, len(self) - len(text), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        text = str.removesuffix(self, suffix)
        return _cut(self, text, 0, len(text))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return _place(self, str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return _place(self, str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines, position = [], 0
        for text, whole in zip(str.splitlines(self, keepends), str.splitlines(self, True), strict=True):
            lines.append(_cut(self, text, position, position + len(text)))
            position += len(whole)
        return lines

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return self._three(str.partition(self, sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return self._three(str.rpartition(self, sep))

    def _three(self, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        first, second = len(parts[0]), len(parts[0]) + len(parts[1])
        return self[:first], self[first:second], self[second:]

    # Methods that put together.
    def join(self, items: Iterable[str], /) -> str:
        pieces: list[str] = []
        for item in items:
            if pieces:
                pieces.append(self)
            pieces.append(item)
        str.join("", pieces)  # raises what str.join raises when an item is no string
        return join_text(pieces)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return _marked(str.replace(self, old, new, count), self, new)
        return as_traced(new).join(self.split(old, count)) if str.__contains__(self, old) else self

    def center(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return _marked(str.center(self, width, fill), self, fill)

    def ljust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return join_text((self, fill * (int(width) - len(self))))

    def rjust(self, width: SupportsIndex, fill: str = " ", /) -> str:
        return join_text((fill * (int(width) - len(self)), self))

    def format(self, *args: object, **kwargs: object) -> str:
        return _marked(str.format(plain(self), *args, **kwargs), self, args, kwargs)

    def format_map(self, mapping: Any, /) -> str:
        return _marked(str.format_map(plain(self), mapping), self, mapping)

    def encode(self, *_: object, **__: object) -> bytes:
        raise SecurityError("A chat template may not turn user text into bytes: its origin would be lost.")


def _same_length_or_marked(method: Callable[..., str]) -> Callable[..., str]:
    def run(self: TracedText, *args: Any) -> str:
        text = method(self, *args)
        # Case mapping only ever lengthens a character, so equal length means that every character kept its place.
        return traced(text, self._spans) if len(text) == len(self) else _marked(text, self)

    run.__name__ = method.__name__
    return run


def _wholly_marked(method: Callable[..., str]) -> Callable[..., str]:
    def run(self: TracedText, *args: Any, **kwargs: Any) -> str:
        return _marked(method(self, *args, **kwargs), self, args, kwargs)

    run.__name__ = method.__name__
    return run


for _method in (str.capitalize, str.casefold, str.lower, str.swapcase, str.title, str.upper):
    setattr(TracedText, _method.__name__, _same_length_or_marked(_method))
for _name in ("expandtabs", "translate", "zfill"):
    setattr(TracedText, _name, _wholly_marked(getattr(str, _name)))

# Methods of an ordinary string whose result can hold characters of their arguments.
MIXING_METHODS: Final = frozenset({"join", "replace", "format", "format_map", "center", "ljust", "rjust", "translate"})


def traced(text: str, spans: Spans = ()) -> TracedText:
    """`text` with the given ranges, none by default."""
    result = TracedText(text)
    result._spans = spans
    return result


def as_traced(text: str) -> TracedText:
    """`text` with the ranges it has."""
    return text if isinstance(text, TracedText) else traced(text)


def user_text(text: str) -> TracedText:
    """`text`, all of it a user's."""
    return traced(text, ((0, len(text)),) if text else ())


def plain(text: str) -> str:
    """The same characters as an ordinary string."""
    return text if type(text) is str else str.removeprefix(text, "")


def spans_of(text: str) -> Spans:
    """The ranges of `text` that a user supplied; none for an ordinary string."""
    return text._spans if isinstance(text, TracedText) else ()


def has_user_text(value: object) -> bool:
    """Whether any character that `value` holds is a user's. Unknown objects count as holding some."""
    if isinstance(value, str):
        return isinstance(value, TracedText) and bool(value._spans)
    if value is None or isinstance(value, _WITHOUT_TEXT):
        return False
    if isinstance(value, dict):
        return any(has_user_text(key) or has_user_text(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return any(has_user_text(item) for item in value)
    return True


def as_text(value: object) -> str:
    """What str(value) gives. The text of anything but a scalar may quote a user, and counts as the user's."""
    if isinstance(value, str):
        return value
    return _marked(str(value), value)


def join_text(pieces: Iterable[object]) -> str:
    """Concatenates like "".join(map(str, pieces)), keeping the ranges."""
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    position = 0
    for piece in pieces:
        text = as_text(piece)
        if isinstance(text, TracedText):
            for start, end in text._spans:
                if spans and spans[-1][1] == position + start:
                    spans[-1] = (spans[-1][0], position + end)
                else:
                    spans.append((position + start, position + end))
        texts.append(text)
        position += len(text)
    joined = "".join(texts)
    return traced(joined, tuple(spans)) if spans else joined


def _marked(text: str, *sources: object) -> str:
    """`text`, wholly a user's if any of what it was made from was."""
    return user_text(text) if has_user_text(sources) else text


def _cut(source: TracedText, text: str, start: int, stop: int) -> str:
    """`text`, which is source[start:stop], with the ranges that fall into it."""
    if not text or not source._spans:
        return plain(text)
    spans = tuple(
        (max(low, start) - start, min(high, stop) - start) for low, high in source._spans if low < stop and high > start
    )
    return traced(text, spans) if spans else plain(text)


def _place(source: TracedText, parts: list[str], sep: str | None) -> list[str]:
    """The ranges of the parts that splitting `source` gave, in order."""
    placed, position = [], 0
    for part in parts:
        if sep is None:
            # Between parts there is only white space, and a part starts with its first other character.
            position = str.find(source, part, position)
        placed.append(_cut(source, part, position, position + len(part)))
        position += len(part) + (len(sep) if sep is not None else 0)
    return placed
