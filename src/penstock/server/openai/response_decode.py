"""From a raw body of POST /v1/responses to a conversation and sampling parameters. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.base.errors import ValidationError
from penstock.frontend.parsers.parts import MessagePart, Reasoning, ToolCall
from penstock.frontend.processor import CallRule, Chat, Thinking
from penstock.messages import GrammarKind, GrammarSpec, SamplingParams
from penstock.messages.bounds import MAX_ENTRIES
from penstock.server.body import MAX_QUOTED_CHARS, decode_body, schema_error
from penstock.server.openai.response_schema import (
    NO_OP_VALUES,
    ForcedTool,
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    MessageItem,
    ReasoningItem,
    ResponseRequest,
)

_decoder = msgspec.json.Decoder(ResponseRequest)
Messages = list[dict[str, Any]]


def decode_request(body: bytes, *, lenient: bool) -> tuple[ResponseRequest, list[InputItem], list[str]]:
    """The request, its input items, and the unknown fields that were ignored. Raises ValidationError."""
    request, ignored = decode_body(_decoder, body, lenient=lenient)
    for name, allowed in NO_OP_VALUES.items():
        value = getattr(request, name)
        if value is not None and value not in allowed:
            raise ValidationError(f"{name} is not supported with this value.", remedy="Leave it out.", param=name)
    _check(request)
    if isinstance(request.input, str):
        return request, [MessageItem(role="user", content=request.input)], ignored
    if not 0 < len(request.input) <= MAX_ENTRIES["messages"]:
        raise ValidationError(f"input must have 1 to {MAX_ENTRIES['messages']} items.", param="input")
    return request, [_item(value, index) for index, value in enumerate(request.input)], ignored


def _item(value: dict[str, Any], index: int) -> InputItem:
    """An item; a message may leave its type out."""
    if "type" not in value:
        value = {"type": "message", **value}
    try:
        item: InputItem = msgspec.convert(value, InputItem)
        return item
    except msgspec.ValidationError as error:
        problem = schema_error(str(error))
        param = f"input[{index}]" + (f".{problem.param}" if problem.param else "")
        raise ValidationError(f"input[{index}]: {problem.message[:MAX_QUOTED_CHARS]}", param=param) from None


def _check(request: ResponseRequest) -> None:
    if request.tool_choice not in (None, "none", "auto") and not request.tools:
        raise ValidationError("tool_choice needs tools.", param="tool_choice")
    if len(request.tools or ()) > MAX_ENTRIES["tools"]:
        raise ValidationError(f"tools has more than {MAX_ENTRIES['tools']} entries.", param="tools")
    if request.background and (request.stream or request.store is False):
        raise ValidationError("background needs store, and cannot be streamed.", param="background")
    for name in ("user", "safety_identifier", "prompt_cache_key", "previous_response_id"):
        value = getattr(request, name)
        if value is not None and len(value) > MAX_ENTRIES["user_chars"]:
            raise ValidationError(f"{name} is over {MAX_ENTRIES['user_chars']} characters.", param=name)
    metadata = request.metadata or {}
    longest = max((len(text) for pair in metadata.items() for text in pair), default=0)
    if len(metadata) > MAX_ENTRIES["metadata"] or longest > MAX_ENTRIES["user_chars"]:
        raise ValidationError(
            f"metadata takes {MAX_ENTRIES['metadata']} pairs of up to {MAX_ENTRIES['user_chars']} characters.",
            param="metadata",
        )


def sampling_of(request: ResponseRequest) -> SamplingParams:
    """Raises ValidationError."""
    given: dict[str, Any] = {
        "max_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "grammar": _grammar(request),
    }
    sampling = SamplingParams(**{name: value for name, value in given.items() if value is not None})
    try:
        sampling.validate()
    except ValidationError as error:
        name = {"max_tokens": "max_output_tokens"}.get(error.param or "", error.param)
        raise ValidationError(error.message.replace("max_tokens", "max_output_tokens"), param=name) from None
    return sampling


def _grammar(request: ResponseRequest) -> GrammarSpec | None:
    wanted = request.text.format if request.text is not None else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return GrammarSpec(GrammarKind.JSON_OBJECT, param="text.format")
    if wanted.schema is None:
        raise ValidationError("text.format.schema is required.", param="text.format.schema")
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(wanted.schema), param="text.format.schema")


def chat_of(request: ResponseRequest, messages: Messages) -> Chat:
    """messages: the conversation, without this request's instructions."""
    shows_tools = request.tools and request.tool_choice != "none"
    tools = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.parameters or {}}
            | ({"strict": True} if tool.strict else {}),
        }
        for tool in request.tools or ()
    ]
    head = [{"role": "system", "content": request.instructions}] if request.instructions else []
    effort = request.reasoning.effort if request.reasoning is not None else None
    variables = {"enable_thinking": False} if effort == "none" else {}
    choice = request.tool_choice
    rule = CallRule.of(
        tools,
        is_required=choice == "required",
        only=choice.name if isinstance(choice, ForcedTool) else None,
        is_parallel=request.parallel_tool_calls is not False,
        has_grammar=_grammar(request) is not None,
    )
    return Chat(
        messages=[*head, *messages],
        tools=tools if shows_tools else None,
        variables=variables,
        call_rule=rule if shows_tools else None,
        thinking=Thinking(effort=None if effort == "none" else effort, param="reasoning.effort"),
    )


def messages_of(items: list[InputItem]) -> Messages:
    """Items in the shape of chat templates: what an assistant thought, said and called in a row is one message."""
    messages: Messages = []
    for item in items:
        match item:
            case MessageItem(role="assistant", content=content):
                turn = _assistant_turn(messages)
                turn["content"] += _text_of(content)
            case MessageItem(role=role, content=content):
                messages.append({"role": "system" if role == "developer" else role, "content": _text_of(content)})
            case ReasoningItem(content=texts):
                _assistant_turn(messages)["reasoning_content"] = "\n".join(part.text for part in texts or ())
            case FunctionCallItem(call_id=call_id, name=name, arguments=arguments):
                call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                _assistant_turn(messages).setdefault("tool_calls", []).append(call)
            case FunctionOutputItem(call_id=call_id, output=output):
                messages.append({"role": "tool", "tool_call_id": call_id, "content": _text_of(output)})
    return messages


def _assistant_turn(messages: Messages) -> dict[str, Any]:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text_of(content: str | list[Any]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def answer_message(parts: Sequence[MessagePart], call_ids: list[str]) -> dict[str, Any]:
    """What the model answered, as a message for the next turn."""
    message: dict[str, Any] = {"role": "assistant", "content": "".join(part for part in parts if isinstance(part, str))}
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = [part for part in parts if isinstance(part, ToolCall)]
    if calls:
        message["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call_id, call in zip(call_ids, calls, strict=True)
        ]
    return message
