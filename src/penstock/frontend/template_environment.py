"""The sandbox that chat templates run in: Jinja as transformers sets it up, with traced strings and bounded work.

Every operation a template can perform on strings passes through here, so that what a user wrote stays known as such
(see traced_text). A template is part of the checkpoint: it may not reach Python, the file system or the network, and
the work it can cause in one rendering is bounded.
Owns: the work counted for the rendering that a thread is in.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Final

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_urlencode, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_environment

from penstock.frontend.traced_format import TracedFormatter, format_percent
from penstock.frontend.traced_text import (
    MIXING_METHODS,
    TracedText,
    as_text,
    as_traced,
    has_user_text,
    join_text,
    plain,
    user_text,
)
from penstock.messages.bounds import MAX_BODY_BYTES

MAX_RENDERED_CHARS: Final = 2 * MAX_BODY_BYTES
MAX_COPIED_CHARS: Final = 1 << 30  # characters put together in one rendering, intermediate strings included
MAX_RANGE_ITEMS: Final = 1_000_000  # items of all ranges of one rendering


class TemplateRefusalError(TemplateError):
    """The template itself called raise_exception: its message is meant for the user."""


class WorkLimitError(TemplateError):
    """One rendering tried to do more than its share."""


class TemplateNamespace(Namespace):
    """namespace(...) without underscored names, which could reach what the sandbox hides."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"A template may not store the underscored name {name!r} in a namespace.")


class GenerationTag(Extension):
    """{% generation %}...{% endgeneration %} marks what an assistant wrote, for training; it renders as its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class TracingCodeGenerator(CodeGenerator):
    """Compiles `a ~ b` to a call of the environment, where it can be traced."""

    @optimizeconst
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - Jinja's name
        self.write("environment.concat((")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write("))")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and runs chat templates. One rendering at a time a thread; `begin()` starts counting its work."""

    code_generator_class = TracingCodeGenerator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        self._work = threading.local()
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, finalize=as_text, extensions=[GenerationTag, loopcontrols]
        )
        for name, function in list(self.filters.items()):
            if name not in _EXACT_FILTERS:
                self.filters[name] = _marking_filter(function)
        self.filters["tojson"] = _marking_filter(_tojson)
        self.filters["urlencode"] = _marking_filter(_urlencode)
        self.filters["join"] = self._join_filter()
        self.filters["replace"] = _replace
        self.filters["string"] = as_text
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=TemplateNamespace, range=self._range
        )
        del self.globals["lipsum"]

    def begin(self) -> None:
        """Starts the count of a new rendering in this thread."""
        self._work.chars = 0
        self._work.items = 0

    def _charge(self, chars: int) -> None:
        self._work.chars = getattr(self._work, "chars", 0) + chars
        if chars > MAX_RENDERED_CHARS or self._work.chars > MAX_COPIED_CHARS:
            raise WorkLimitError("The chat template builds too much text.")

    def _range(self, *args: int) -> range:
        items = range(*args)
        self._work.items = getattr(self._work, "items", 0) + len(items)
        if self._work.items > MAX_RANGE_ITEMS:
            raise WorkLimitError("The chat template counts too far.")
        return items

    def concat(self, pieces: Iterable[object]) -> str:
        """Joins what a template, a macro or a set-block puts out."""
        collected = [as_text(piece) for piece in pieces]
        self._charge(sum(map(len, collected)))
        return join_text(collected)

    def _join_filter(self) -> Callable[..., str]:
        @pass_environment
        def join(_: object, value: Iterable[object], d: object = "", attribute: str | int | None = None) -> str:
            items = value if attribute is None else map(make_attrgetter(self, attribute), value)
            pieces: list[object] = []
            for item in items:
                if pieces:
                    pieces.append(d)
                pieces.append(item)
            return self.concat(pieces)

        return join

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self._charge(_product_length(left, right))
        elif operator == "**" and not (abs(left) <= 1_000_000 and abs(right) <= 64):
            raise WorkLimitError("The chat template raises a number to too high a power.")
        elif operator == "%" and isinstance(left, str):
            self._charge(len(left))
            return format_percent(left, right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str):
            self._charge(len(result))
            # TracedText's own operators have traced it; any other str that holds user text lost the ranges.
            if not isinstance(result, TracedText) and has_user_text((left, right)):
                return user_text(plain(result))
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, PYI063
        # The names are Jinja's: they cannot clash with a macro's keyword arguments.
        receiver = getattr(__obj, "__self__", None)
        if isinstance(receiver, str) and not isinstance(receiver, TracedText):
            if __obj.__name__ not in MIXING_METHODS:
                return super().call(__context, __obj, *args, **kwargs)
            if has_user_text((args, kwargs)):
                __obj = getattr(as_traced(receiver), __obj.__name__)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            __self._charge(len(result))
            # What these give back was traced as it was put together, or was an element.
            exact = isinstance(__obj, _TRACED_CALLABLES) or isinstance(receiver, (TracedText, dict, list))
            if not exact and has_user_text((args, kwargs)):
                return user_text(plain(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        return None if super().wrap_str_format(value) is None else _FormatMethod(self, value)


class _FormatMethod:
    """A string's format or format_map method as a template sees it."""

    def __init__(self, environment: TemplateEnvironment, method: Any) -> None:
        self._formatter = TracedFormatter(environment)
        self._pattern: str = method.__self__
        self._takes_mapping = method.__name__ == "format_map"

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        if self._takes_mapping:
            (kwargs,), args = args, ()
        return self._formatter.vformat(self._pattern, args, kwargs)


_TRACED_CALLABLES: Final = (Macro, LoopContext, BlockReference, _FormatMethod)


# Jinja's filters that give back an element, or do no more to a string than call one of its methods.
_EXACT_FILTERS: Final = frozenset(
    {"attr", "capitalize", "d", "default", "first", "last", "lower", "max", "min", "random", "string", "trim", "upper"}
)


def _marking_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result, if it is a string, is wholly the user's when anything that went in was.

    Also when that result is traced in part: the filter may have joined it from more than the part that is.
    """

    @functools.wraps(function)  # carries over the mark that says which of Jinja's objects it wants first
    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if isinstance(result, str) and has_user_text((args, kwargs)):
            return user_text(plain(result))
        return result

    return run


def _product_length(left: Any, right: Any) -> int:
    """Elements of left * right when one is a sequence, else 0."""
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
            return len(sequence) * max(count, 0)
    return 0


def _raise_exception(message: object) -> None:
    raise TemplateRefusalError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - the machine's own time, as transformers has it


def _replace(value: object, old: object, new: object, count: int | None = None) -> str:
    return as_traced(as_text(value)).replace(as_text(old), as_text(new), -1 if count is None else count)


def _urlencode(value: Any) -> str:
    return do_urlencode(plain(value) if isinstance(value, str) else value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; prompts are not HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
