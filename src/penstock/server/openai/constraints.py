"""What a request wants its answer to look like: response_format, structured_outputs, forced and strict tools."""

from __future__ import annotations

import json
from typing import Any

from penstock.base.errors import ValidationError
from penstock.frontend.processor import CallRule
from penstock.messages import GrammarKind, GrammarSpec
from penstock.server.openai.schema import (
    ChatRequest,
    CompletionRequest,
    ForcedTool,
    GenerateRequest,
    ResponseFormat,
    StructuredOutputs,
)


def response_grammar(request: ChatRequest | CompletionRequest | GenerateRequest) -> GrammarSpec | None:
    """The grammar of the whole answer. Raises ValidationError."""
    given = [
        grammar
        for grammar in (
            _of_response_format(request.response_format) if request.response_format is not None else None,
            _of_structured_outputs(request.structured_outputs) if request.structured_outputs is not None else None,
        )
        if grammar is not None
    ]
    if len(given) > 1:
        raise ValidationError("response_format and structured_outputs exclude each other.", param="structured_outputs")
    return given[0] if given else None


def _of_response_format(wanted: ResponseFormat) -> GrammarSpec | None:
    param = "response_format"
    names = ("json_schema", "structures", "triggers", "format", "value")
    given = [name for name in names if getattr(wanted, name) is not None]
    allowed = {"json_schema": ("json_schema",), "structural_tag": ("structures", "triggers", "format"),
               **dict.fromkeys(("json_object", "json", "regex"), ("value",))}  # fmt: skip
    for name in given:
        if name not in allowed.get(wanted.type, ()):
            raise ValidationError(f"{param} of type {wanted.type} takes no {name}.", param=f"{param}.{name}")
    if wanted.value is not None or wanted.type in ("json", "regex"):
        return _of_value(wanted, f"{param}.value")
    if wanted.type == "json_object":
        return GrammarSpec(GrammarKind.JSON_OBJECT, param=param)
    if wanted.type == "json_schema":
        schema = wanted.json_schema.schema if wanted.json_schema is not None else None
        if schema is None:
            raise ValidationError(f"{param}.json_schema.schema is required.", param=f"{param}.json_schema.schema")
        return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(schema), param=f"{param}.json_schema.schema")
    if wanted.type == "structural_tag":
        tag = {name: getattr(wanted, name) for name in given}
        return GrammarSpec(GrammarKind.STRUCTURAL_TAG, json.dumps(tag), param=param)
    return None


def _of_value(wanted: ResponseFormat, param: str) -> GrammarSpec:
    """TGI's forms: a pattern, or a schema as an object."""
    if wanted.type == "regex" and isinstance(wanted.value, str):
        return GrammarSpec(GrammarKind.REGEX, wanted.value, param=param)
    if wanted.type != "regex" and isinstance(wanted.value, dict):
        return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(wanted.value), param=param)
    kind = "a text" if wanted.type == "regex" else "a schema"
    raise ValidationError(f"{param} must be {kind} for type {wanted.type}.", param=param)


def _of_structured_outputs(wanted: StructuredOutputs) -> GrammarSpec:
    param = "structured_outputs"
    given = [name for name in wanted.__struct_fields__ if getattr(wanted, name) is not None]
    if wanted.json_object is False:
        given.remove("json_object")
    if len(given) != 1:
        raise ValidationError(f"{param} takes exactly one of {', '.join(wanted.__struct_fields__)}.", param=param)
    name = given[0]
    value: Any = getattr(wanted, name)
    kind = GrammarKind.JSON_SCHEMA if name == "json" else GrammarKind(name)
    text = "" if kind is GrammarKind.JSON_OBJECT else value if isinstance(value, str) else json.dumps(value)
    return GrammarSpec(kind, text, param=f"{param}.{name}")


def call_rule(request: ChatRequest) -> CallRule | None:
    """What is enforced of the calls; None where nothing is. Raises ValidationError."""
    choice, tools = request.tool_choice, request.tools
    if choice is not None and choice != "none" and not tools:
        raise ValidationError("tool_choice needs tools.", param="tool_choice")
    if not tools or choice == "none":
        return None
    return CallRule.of(
        tools,
        is_required=choice == "required",
        only=choice.function.name if isinstance(choice, ForcedTool) else None,
        is_parallel=request.parallel_tool_calls is not False,
        has_grammar=response_grammar(request) is not None,
    )
