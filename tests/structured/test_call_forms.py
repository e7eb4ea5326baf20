"""Every form of calls: what its grammar lets through is read by the format's parser as calls with valid arguments."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from vocabularies import PIECES

from penstock.frontend.parsers.blocks import BlockParser
from penstock.frontend.parsers.call_forms import CALL_FORMS, HARMONY_FORM
from penstock.frontend.parsers.choose import FORMATS
from penstock.frontend.parsers.harmony import MARKERS, HarmonyParser
from penstock.frontend.parsers.parts import PartParser, ToolCall, merge_parts
from penstock.messages import CallForm, CallStyle, GrammarSpec, ToolCallSpec, ToolSpec, Vocabulary
from penstock.structured.backend import GrammarError
from penstock.structured.llguidance_backend import LlguidanceBackend

CITY: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["city", "days"],
    "properties": {
        "unit": {"type": "string", "enum": ["C", "CF", "F"]}, "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"},
        "code": {"type": "string", "pattern": "^[a-z]{2}/[0-9]+$"},
    },
}  # fmt: skip
DEGREES = {"type": "number", "minimum": -9, "maximum": 90}
NESTED: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["where"],
    "properties": {
        "where": {"type": "object", "additionalProperties": False, "required": ["at"],
                  "properties": {"at": {"type": "array", "items": DEGREES, "minItems": 1, "maxItems": 2},
                                 "label": {"type": "string"}}},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
        "maybe": {"type": ["integer", "null"]},
    },
}  # fmt: skip
TOOLS = [
    ToolSpec("get_city", CITY),
    ToolSpec("put.it", NESTED),
    ToolSpec("noop", {"type": "object", "additionalProperties": False}),
]
SCHEMAS: dict[str, dict[str, Any]] = {tool.name: tool.parameters or {} for tool in TOOLS}
FORMS = [form for forms in CALL_FORMS.values() for _, form in forms] + [HARMONY_FORM]
MARKER = re.compile(
    r"<\|[^<>]*\|>|<｜[^<>]*｜>|｜DSML｜|\[TOOL_CALLS\]|\[ARGS\]|</?tool_call>|<\|tool_call>|<tool_call\|>"
)


def vocabulary(form: CallForm, *, has_control_tokens: bool) -> Vocabulary:
    written = "".join(part for part in MARKERS) if form.style is CallStyle.HARMONY else "".join(
        value for value in (form.open, form.before_name, form.after_name, form.tail, form.close, form.quote,
                            form.before_key, form.after_value)
    )  # fmt: skip
    control = sorted(set(MARKER.findall(written))) if has_control_tokens else []
    tokens = [*(bytes((byte,)) for byte in range(256)), *PIECES, *(text.encode() for text in control), b"<eos>"]
    return Vocabulary(tokens, list(range(256 + len(PIECES), len(tokens))), [len(tokens) - 1])


def parser_of(form: CallForm) -> PartParser:
    schemas = {name: schema.get("properties", {}) for name, schema in SCHEMAS.items()}
    if form.style is CallStyle.HARMONY:
        return HarmonyParser(schemas)
    [known] = [known for known in FORMATS if known.name == form.name]
    return BlockParser(known, schemas)


def write(vocab: Vocabulary, form: CallForm, spec: GrammarSpec, seed: int) -> str:
    """Something that the grammar lets through: tokens at random, and now and then a piece that ends something."""
    backend = LlguidanceBackend(vocab)
    text = backend.text(spec)
    backend.check(text)
    matcher, chance = backend.compile(text), random.Random(seed)
    mask = np.zeros(-(-len(vocab.token_bytes) // 32), dtype=np.int32)
    ends = [
        form.close,
        form.tail + form.close,
        form.after_value,
        form.quote,
        form.tail,
        '"',
        "}",
        "]",
        ")",
        ":",
        "<|end|>",
    ]
    endings = [ids for end in ends if (ids := tokenize(vocab, end))]
    ids: list[int] = []
    printable = {token_id for token_id, token in enumerate(vocab.token_bytes) if all(31 < byte < 127 for byte in token)}
    while not matcher.is_complete() or chance.random() < 0.8:
        assert len(ids) < 3000, b"".join(vocab.token_bytes[one] for one in ids)
        # What fits twice is text of a string in JSON, which may hold anything.
        fitting = [
            one for one in endings if matcher.accepts_all(one) and (len(one) == 1 or not matcher.accepts_all(one * 2))
        ]
        if fitting and chance.random() < 0.2 + len(ids) / 3000:
            ids += (ending := fitting[0] if len(ids) > 1000 else chance.choice(fitting))
            assert matcher.consume_all(ending)
            continue
        matcher.fill_mask(mask.ctypes.data, mask.nbytes)
        assert not matcher.error(), matcher.error()
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        allowed = [one for one in allowed if one not in vocab.eos_token_ids]
        if not allowed:
            break
        ids.append(chance.choice([one for one in allowed if one in printable] or allowed))
        assert matcher.consume(ids[-1])
    return b"".join(vocab.token_bytes[one] for one in ids).decode(errors="replace")


def check_calls(form: CallForm, text: str, *, at_least: int) -> list[ToolCall]:
    parser = parser_of(form)
    parts = merge_parts([part for character in text for part in parser.feed(character)] + parser.finish())
    whole = parser_of(form)
    assert merge_parts(whole.feed(text) + whole.finish()) == parts
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert len(calls) >= at_least, (text, parts)
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    return calls


@pytest.mark.parametrize("has_control_tokens", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name} {form.open or form.before_name}"[:30])
def test_what_the_grammar_lets_through_is_calls_with_valid_arguments(form: CallForm, has_control_tokens: bool) -> None:
    vocab = vocabulary(form, has_control_tokens=has_control_tokens or form.style is CallStyle.HARMONY)
    seen: set[str] = set()
    for seed in range(5):
        spec = ToolCallSpec(form, TOOLS, is_required=True, max_calls=None if seed % 2 else 1).to_grammar("tools")
        text = write(vocab, form, spec, seed)
        calls = check_calls(form, text, at_least=1)
        assert seed % 2 or len(calls) == 1
        seen |= {call.name for call in calls}
    assert len(seen) > 1


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name} {form.open or form.before_name}"[:30])
def test_text_may_stand_where_calls_are_not_required(form: CallForm) -> None:
    vocab = vocabulary(form, has_control_tokens=form.style is CallStyle.HARMONY)
    spec = ToolCallSpec(form, TOOLS, is_required=False).to_grammar("tools")
    backend = LlguidanceBackend(vocab)
    text = backend.text(spec)
    backend.check(text)
    answer = "<|channel|>final<|message|>just text" if form.style is CallStyle.HARMONY else "just text"
    ids = tokenize(vocab, answer)
    matcher = backend.compile(text)
    assert matcher.consume_all(ids)
    assert matcher.is_complete()


def tokenize(vocab: Vocabulary, text: str) -> list[int]:
    control = {vocab.token_bytes[token_id].decode(): token_id for token_id in vocab.special_token_ids}
    pattern = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
    ids: list[int] = []
    for piece in re.split(f"({pattern})", text):
        ids += [control[piece]] if piece in control else list(piece.encode())
    return ids


@pytest.mark.parametrize(("name", "parameters", "message"), [
    ("glm", {"type": "object", "properties": {"a": {"type": "string", "format": "date"}}}, "'format'"),
    ("glm", {"anyOf": [{"type": "object"}]}, "'anyOf'"),
    ("qwen_coder", {"type": "object", "properties": {"a>b": {"type": "string"}}}, "a>b"),
    ("gemma", {"type": "object", "properties": {"a": {"oneOf": [{"type": "string"}]}}}, "without a type"),
    ("pythonic", {"type": "object", "properties": {"a b": {}}}, "a b"),
    ("pythonic", {"type": "object", "minProperties": 1}, "'minProperties'"),
])  # fmt: skip
def test_what_a_form_cannot_enforce_is_refused_by_name(name: str, parameters: dict[str, Any], message: str) -> None:
    form = CALL_FORMS[name][-1][1]
    backend = LlguidanceBackend(vocabulary(form, has_control_tokens=False))
    with pytest.raises(GrammarError, match=message):
        backend.text(ToolCallSpec(form, [ToolSpec("f", parameters)], is_required=True).to_grammar("tools"))


def test_every_format_has_a_form() -> None:
    assert set(CALL_FORMS) == {known.name for known in FORMATS}
