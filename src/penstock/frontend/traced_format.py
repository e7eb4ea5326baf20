"""`%` and `str.format` on traced strings: the literal parts of a pattern keep their own origin, apart from the values'.

Chat templates write control tokens in patterns ('[INST] %s [/INST]' % content), so marking the whole result as the
user's, as is done for rarer operations, would break them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from jinja2.sandbox import SandboxedFormatter

from penstock.frontend.traced_text import TracedText, has_user_text, join_text, plain, user_text

_CONVERSION: Final = re.compile(
    r"%(?:\((?P<key>[^)]*)\))?[-#0 +]*(?P<width>\*|\d+)?(?:\.(?P<precision>\*|\d+))?[a-zA-Z%]"
)


def format_percent(pattern: str, values: Any) -> str:
    """`pattern % values`, raising what Python raises."""
    whole: str = plain(pattern) % values
    if not has_user_text((pattern, values)):
        return whole
    pieces = list(_percent_pieces(pattern, values))
    traced_whole = join_text(pieces)
    # A pattern read differently than Python reads it (a width given as `*`) must not pass for template text.
    return traced_whole if traced_whole == whole else user_text(whole)


def _percent_pieces(pattern: str, values: Any) -> Iterator[str]:
    remaining = iter(values if isinstance(values, tuple) else (values,))
    position = 0
    for match in _CONVERSION.finditer(pattern):
        yield pattern[position : match.start()]
        position = match.end()
        conversion = plain(match[0])
        if conversion.endswith("%"):
            yield "%"
        elif match["key"] is not None:
            yield _converted(conversion, values, values.get(match["key"]))
        else:
            value = next(remaining, None)
            yield _converted(conversion, (value,), value)
    yield pattern[position:]


def _converted(conversion: str, arguments: Any, value: object) -> str:
    if conversion == "%s" and isinstance(value, str):
        return value
    try:
        text = conversion % arguments
    except (TypeError, ValueError):
        return ""  # misread: the caller sees that the whole differs
    return user_text(text) if has_user_text(value) else text


class TracedFormatter(SandboxedFormatter):
    """Formats piece by piece, with the sandbox's checks on what fields may reach."""

    def vformat(self, format_string: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        whole = super().vformat(plain(format_string), args, kwargs)
        if not has_user_text((format_string, list(args), dict(kwargs))):
            return whole
        try:
            traced_whole = join_text(self._pieces(format_string, args, kwargs))
        except (LookupError, TypeError, ValueError):  # nested fields, which count on from those outside
            return user_text(whole)
        return traced_whole if traced_whole == whole else user_text(whole)

    def _pieces(self, pattern: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[str]:
        if isinstance(pattern, TracedText):  # a user's own pattern: nothing in it is worth keeping apart
            yield user_text(super().vformat(plain(pattern), args, kwargs))
            return
        next_index = 0
        for literal, field, spec, conversion in self.parse(pattern):
            yield literal
            if field is None:
                continue
            if not field or field[0] in ".[":
                field, next_index = f"{next_index}{field}", next_index + 1
            value, _ = self.get_field(field, args, kwargs)
            if isinstance(value, str) and not spec and not conversion:
                yield value
                continue
            single = f"{{0{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
            text = super().vformat(single, (value, *args), kwargs)
            yield user_text(text) if has_user_text(value) else text
