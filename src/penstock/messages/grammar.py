"""What an output has to look like: the one form that every protocol's structured output and forced tools become."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from penstock.base.errors import ValidationError
from penstock.messages.bounds import MAX_ENTRIES


class GrammarKind(enum.StrEnum):
    """What GrammarSpec.text holds."""

    JSON_OBJECT = "json_object"  # nothing: any JSON object
    JSON_SCHEMA = "json_schema"  # a JSON schema, as JSON
    REGEX = "regex"  # a regular expression in the syntax of Rust's `regex`, matched against the whole output
    CHOICE = "choice"  # a JSON list of texts, one of which is the whole output
    GRAMMAR = "grammar"  # Lark as llguidance extends it, or EBNF in llama.cpp's form (`root ::= ...`)
    STRUCTURAL_TAG = "structural_tag"  # free text with constrained parts: see structured.structural_tag
    TOOL_CALLS = "tool_calls"  # a ToolCallSpec, as JSON
    TEXT = "text"  # nothing: any text, behind a budgeted `after`


class GrammarSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A constraint on a whole output.

    after: where not empty, free text up to and with this comes first (a model's reasoning, and the tag that ends it).
    after_tokens: at most so many tokens of it before `after` is forced, which has to be a token then; 0 for any number.
    opened_by: where not empty, that text counts only where the output begins with this; it may do without.
    param: the request's field to name when it is refused.
    """

    kind: GrammarKind
    text: str = ""
    after: str = ""
    param: str = ""
    after_tokens: int = 0
    opened_by: str = ""

    @classmethod
    def json_object(cls) -> GrammarSpec:
        """Any JSON object."""
        return cls(GrammarKind.JSON_OBJECT)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> GrammarSpec:
        """JSON that a schema accepts. Keywords that cannot be enforced are refused when the request is made."""
        return cls(GrammarKind.JSON_SCHEMA, json.dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> GrammarSpec:
        """Text that a regular expression matches as a whole."""
        return cls(GrammarKind.REGEX, pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> GrammarSpec:
        """One of these texts."""
        return cls(GrammarKind.CHOICE, json.dumps(list(choices)))

    @classmethod
    def grammar(cls, text: str) -> GrammarSpec:
        """Text of a context-free language: Lark, or EBNF (`root ::= ...`)."""
        return cls(GrammarKind.GRAMMAR, text)

    @classmethod
    def structural_tag(cls, tag: Mapping[str, Any]) -> GrammarSpec:
        """Free text in which certain parts obey schemas."""
        return cls(GrammarKind.STRUCTURAL_TAG, json.dumps(tag))

    def validate(self) -> None:
        """Raises ValidationError when the text is too long. Whether it means anything is found out by compiling it."""
        if len(self.text) > MAX_ENTRIES["grammar_chars"]:
            raise ValidationError(
                f"{self.param or self.kind.value} has {len(self.text)} characters, more than "
                f"{MAX_ENTRIES['grammar_chars']}.",
                param=self.param or None,
            )


class ToolSpec(msgspec.Struct, array_like=True):
    """A tool that may be called. parameters: a JSON schema of its arguments; None leaves them free."""

    name: str
    parameters: dict[str, Any] | None = None


class CallStyle(enum.StrEnum):
    """How a form writes the arguments of a call."""

    JSON = "json"
    TAGGED = "tagged"  # each between tags: text bare, anything else as JSON
    PYTHON = "python"  # keyword arguments
    GEMMA = "gemma"  # bare keys, text between `quote` and `quote`
    HARMONY = "harmony"  # a channel of its own for each call; the members of CallForm count for nothing


class CallForm(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """How a model writes calls: `open` call (`separator` call)* `close`, where a call is `before_name`, the name,
    `after_name`, the arguments, `tail`. Empty members are nothing.

    trigger: the beginning of all this that tells it from text. starts: characters that text does not begin with, where
    only that tells calls from it. Without either, calls can be required, but not be watched for in text.
    is_numbered: after the name comes a colon and the call's number. is_single: there is never more than one call.
    before_key to not_in_text: of TAGGED. An argument is `before_key`, the key, `before_text` or `before_json`, the
    value, `after_value`; not_in_text: what no bare text may hold. quote: of GEMMA.
    """

    name: str
    style: CallStyle = CallStyle.JSON
    trigger: str = ""
    starts: str = ""
    open: str = ""
    before_name: str = ""
    after_name: str = ""
    tail: str = ""
    separator: str = ""
    close: str = ""
    is_numbered: bool = False
    is_single: bool = False
    before_key: str = ""
    before_text: str = ""
    before_json: str = ""
    after_value: str = ""
    not_in_text: tuple[str, ...] = ()
    quote: str = ""


class ToolCallSpec(msgspec.Struct, array_like=True):
    """Which calls an output may or must hold, in the form the model was trained on.

    is_required: the output is calls and nothing else; otherwise it is text in which calls, where there are any, are
    well-formed. max_calls: None for any number. content: what the output is where it is no call, in the place of text.
    """

    form: CallForm
    tools: list[ToolSpec]
    is_required: bool
    max_calls: int | None = None
    content: GrammarSpec | None = None

    def to_grammar(self, param: str) -> GrammarSpec:
        return GrammarSpec(GrammarKind.TOOL_CALLS, msgspec.json.encode(self).decode(), param=param)


class Vocabulary(msgspec.Struct, tag="vocabulary", array_like=True):
    """What a frontend tells an engine of its tokens, once, so that it can constrain outputs.

    token_bytes: the UTF-8 bytes of every token of the model's vocabulary (parts of characters included); empty for
    ids without text. special_token_ids: those that are no text, whatever their bytes say. eos_token_ids: those that
    end a sequence. tokenizer: the tokenizer, as the JSON that `tokenizers` reads; empty where it has no such form.
    """

    token_bytes: list[bytes]
    special_token_ids: list[int]
    eos_token_ids: list[int]
    tokenizer: str = ""

    def of_size(self, vocab_size: int) -> Vocabulary:
        """What a model with `vocab_size` tokens can say of these; what only the model has is no text."""
        token_bytes = self.token_bytes[:vocab_size]
        return Vocabulary(
            token_bytes=token_bytes + [b""] * (vocab_size - len(token_bytes)),
            special_token_ids=[token_id for token_id in self.special_token_ids if token_id < vocab_size],
            eos_token_ids=[token_id for token_id in self.eos_token_ids if token_id < vocab_size],
            tokenizer=self.tokenizer,
        )
