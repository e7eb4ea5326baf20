"""Writing grammars in llguidance's Lark: literals, special tokens, regular expressions, schemas, free text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from penstock.structured.backend import GrammarError
from penstock.structured.json_schema import enforceable
from penstock.structured.string_schema import string_values, text_patterns

# Forced text has many spellings in tokens. The one that counts is the tokenizer's: see spelling.py.
HEADER: Final = '%llguidance {"no_forcing": false}\n'


class LarkGrammar:
    """Rules in the making. Names of rules are ours alone; what a user wrote stands in literals and schemas only."""

    def __init__(self, special_token_ids: Mapping[str, int]) -> None:
        """special_token_ids: by text. Where a literal holds one of them, it means the token."""
        self._special = special_token_ids
        self._pattern = re.compile("|".join(map(re.escape, sorted(special_token_ids, key=len, reverse=True))) or "(?!)")
        self._rules: list[str] = []
        self._inner: list[dict[str, str]] = []
        self._num_names = 0

    def rule(self, body: str, name: str = "", attributes: str = "") -> str:
        """Adds a rule; its name."""
        if not name:
            self._num_names += 1
            name = f"r{self._num_names}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def terminal(self, body: str) -> str:
        """Adds a rule that is matched as one piece; its name."""
        self._num_names += 1
        return self.rule(body, f"T{self._num_names}")

    def literal(self, text: str) -> str:
        """Exactly this text, with control tokens as such. Empty text is nothing."""
        parts: list[str] = []
        position = 0
        for match in self._pattern.finditer(text):
            parts += (_quoted(text[position : match.start()]), f"<[{self._special[match[0]]}]>")
            position = match.end()
        parts.append(_quoted(text[position:]))
        return " ".join(part for part in parts if part)

    def schema(self, schema: Any, where: str = "schema", *, escapes: str = "") -> str:
        """JSON that a schema accepts. where: what to call it in an error. escapes: the only letters that may follow a
        backslash. Raises GrammarError."""
        checked = enforceable(schema, where)
        if escapes:
            checked["x-guidance"] = {**checked["x-guidance"], "json_allowed_escapes": escapes}
        return self.rule("%json " + json.dumps(checked))

    def grammar(self, text: str) -> str:
        """A grammar of its own, whose names do not meet ours."""
        name = f"g{len(self._inner)}"
        self._inner.append({"name": name, "lark_grammar": HEADER + text})
        return self.rule(f"@{name}")

    def text_until(self, marker: str) -> str:
        """Free text up to the first marker, and the marker."""
        text = self.terminal(r"/(?s:.)*/")
        if self._pattern.fullmatch(marker):
            return self.rule(f"{text} <[{self._special[marker]}]>")
        return self.rule(f"{text} {_quoted(marker)}", attributes="[lazy]")

    def bare_text(self, end: str, schema: Mapping[str, Any], not_in_text: Sequence[str] = (), where: str = "") -> str:
        """Text that a string schema accepts, and `end`, which it does not hold, nor any of not_in_text.

        White space at the beginning of `end` may be left out. Text with a least length or a pattern does not hold the
        first character of `end` either: what is left of it could otherwise be nothing.
        Raises GrammarError naming a keyword that cannot be enforced on text without quotes.
        """
        control = self._pattern.search(end)
        plain = end[: control.start()] if control else end
        if values := string_values(schema, where):
            choice = self.terminal(alternatives(_quoted(value + plain) or '""' for value in values))
            return self.rule(f"{choice} {self.literal(end[len(plain) :])}")
        core = plain.strip()
        space = "\\n?" if plain.startswith("\n") else ""
        behind = plain.rstrip()
        parts = [f"/{pattern}{space}{_escaped(core)}/" for pattern in text_patterns(schema, where)]
        if core and schema.keys() & {"minLength", "pattern"}:
            parts.append(f"/[^{_escaped(core[0])}]*{_escaped(core)}/")
        barred = [marker for marker in not_in_text if not self._pattern.search(marker) and marker not in plain]
        if barred:
            parts.append(f"~/(?s:.*)({'|'.join(map(_escaped, barred))})(?s:.*)/")
        text = self.rule(self.terminal(" & ".join(parts)), attributes="[lazy]" if core else "")
        return self.rule(f"{text} {self.literal(end[len(behind) :])}")

    def after(self, marker: str, rule: str) -> str:
        """Free text up to and with the marker, perhaps some white space, then the rule."""
        space = self.terminal(r"/[ \n]{1,4}/")
        return self.rule(f"{self.text_until(marker)} {space}? {rule}")

    def after_at_most(self, marker: str, num_tokens: int, opening: str, rule: str) -> str:
        """`after`, with the marker forced behind num_tokens tokens. opening: what begins the text, unless it is open.

        Raises GrammarError where the marker is no token.
        """
        if not self._pattern.fullmatch(marker):
            raise GrammarError(f"{marker} is no token of this model, so its reasoning cannot be ended by force")
        # The library's own max_tokens cannot be taken back, which looking for a way to the end has to.
        text = self.rule(f"<[^{_ranges(self._special.values())}]>{{0,{num_tokens}}}")
        space = self.terminal(r"/[ \n]{1,4}/")
        reasoning = self.rule(f"{self.literal(opening)} {text} {self.literal(marker)}")
        return self.rule(f"{reasoning} {space}? {rule}" + (f" | {rule}" if opening else ""))

    def any_tokens(self) -> str:
        """Any text, with any control tokens in it."""
        text = self.terminal(r"/(?s:.)+/")
        return self.rule(f"({text} | <[*]>)*")

    def regex(self, pattern: str) -> str:
        return self.terminal(_slashed(pattern))

    def text_between(self, triggered: Sequence[tuple[str, str]], *, at_least_one: bool, only_one: bool) -> str:
        """Free text, in which a trigger begins something that must go on as its rule says. (trigger, the rest).

        After the notes on tool calling in llguidance's docs/syntax.md: a control token never is text; other triggers
        end a lazy match.
        """
        text = self.terminal(r"/(?s:.)*/")
        lazy: dict[str, str] = {}
        parts: list[str] = []
        for trigger, rest in triggered:
            match = self._pattern.match(trigger)
            if match:
                control = f"<[{self._special[match[0]]}]> {self.literal(trigger[match.end() :])}"
                parts.append(self.rule(f"{text} {control} {rest}"))
                continue
            if trigger not in lazy:
                lazy[trigger] = self.rule(f"{text} {_quoted(trigger)}", attributes="[lazy]")
            parts.append(self.rule(f"{lazy[trigger]} {rest}"))
        part = self.rule(alternatives(parts))
        if only_one:
            return part if at_least_one else self.rule(f"{part} | {text}")
        return self.rule(f"{part}{'+' if at_least_one else '*'} {self.rule(text)}")

    def finish(self, start: str) -> str:
        """The whole grammar."""
        text = HEADER + "\n".join([f"start: {start}", *self._rules]) + "\n"
        return json.dumps({"grammars": [{"lark_grammar": text}, *self._inner]}) if self._inner else text


def _escaped(text: str) -> str:
    """For a regular expression between slashes."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&~/-]", r"\\\g<0>", text).replace("\n", "\\n")


def alternatives(names: Iterable[str]) -> str:
    return " | ".join(names)


def _ranges(ids: Iterable[int]) -> str:
    """Token ids as llguidance writes sets of them: 1-3,7."""
    ranges: list[tuple[int, int]] = []
    for token_id in sorted(ids):
        if ranges and ranges[-1][1] == token_id - 1:
            ranges[-1] = (ranges[-1][0], token_id)
        else:
            ranges.append((token_id, token_id))
    return ",".join(f"{first}-{last}" for first, last in ranges)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _slashed(pattern: str) -> str:
    """A regular expression between slashes."""
    out: list[str] = []
    escaped = False
    for character in pattern:
        if character == "\n":
            out.append("n" if escaped else "\\n")
        elif character == "/" and not escaped:
            out.append("\\/")
        else:
            out.append(character)
        escaped = character == "\\" and not escaped
    return f"/{''.join(out)}/"
