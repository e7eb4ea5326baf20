"""From a raw body to a conversation and sampling parameters: every refusal names the field. Pure."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from penstock.base.errors import ValidationError
from penstock.frontend.fill_in_middle import Gap
from penstock.frontend.processor import Chat, Thinking
from penstock.messages import GrammarKind, GrammarSpec, SamplingParams
from penstock.messages.bounds import MAX_ENTRIES
from penstock.server.body import decode_body
from penstock.server.ollama.schema import (
    NO_OP_OPTIONS,
    NO_OP_VALUES,
    ChatRequest,
    GenerateRequest,
    Message,
    Options,
    ShowRequest,
)

# What Ollama's clients expect when they say nothing.
_DEFAULTS: Final[dict[str, Any]] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
_chat_decoder = msgspec.json.Decoder(ChatRequest)
_generate_decoder = msgspec.json.Decoder(GenerateRequest)
_show_decoder = msgspec.json.Decoder(ShowRequest)


def decode_chat(body: bytes, *, lenient: bool) -> tuple[ChatRequest, list[str]]:
    """The request and the unknown fields that were ignored. Raises ValidationError."""
    request, ignored = decode_body(_chat_decoder, body, lenient=lenient)
    _check(request)
    for name in ("messages", "tools"):
        if len(getattr(request, name) or ()) > MAX_ENTRIES[name]:
            raise ValidationError(f"{name} has more than {MAX_ENTRIES[name]} entries.", param=name)
    return request, ignored


def decode_generate(body: bytes, *, lenient: bool) -> tuple[GenerateRequest, list[str]]:
    """The request and the unknown fields that were ignored. Raises ValidationError."""
    request, ignored = decode_body(_generate_decoder, body, lenient=lenient)
    _check(request)
    return request, ignored


def decode_show(body: bytes) -> str:
    """The model's name. Raises ValidationError."""
    request, _ = decode_body(_show_decoder, body)
    name = request.model or request.name
    if not name:
        raise ValidationError("model is required.", param="model")
    return name


def _check(request: ChatRequest | GenerateRequest) -> None:
    for owner, prefix, allowed in ((request, "", NO_OP_VALUES), (request.options, "options.", NO_OP_OPTIONS)):
        for name, values in allowed.items():
            value = getattr(owner, name, None)
            if value is not None and not any(value == one and type(value) is type(one) for one in values):
                raise ValidationError(
                    f"{prefix}{name} is not supported with this value.", remedy="Leave it out.", param=prefix + name
                )


def chat_of(request: ChatRequest) -> Chat:
    """The conversation in the shape that chat templates know."""
    return Chat(
        messages=[_template_message(message) for message in request.messages],
        tools=[_tool(tool, index) for index, tool in enumerate(request.tools)] if request.tools else None,
        variables=_variables(request),
        thinking=_thinking(request),
    )


def _tool(tool: dict[str, Any], index: int) -> dict[str, Any]:
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValidationError(f"tools[{index}].function.name is required.", param=f"tools[{index}].function.name")
    return tool


def _template_message(message: Message) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.thinking:
        entry["reasoning_content"] = message.thinking
    if message.tool_name is not None:
        entry["name"] = message.tool_name
    if message.tool_call_id is not None:
        entry["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        entry["tool_calls"] = [
            {
                "id": call.id or f"call_{index}",
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": json.dumps(call.function.arguments, ensure_ascii=False),
                },
            }
            for index, call in enumerate(message.tool_calls)
        ]
    return entry


def prompt_of(request: GenerateRequest) -> str | Chat | Gap:
    if request.suffix:
        for name in ("system", "think"):
            if getattr(request, name):
                raise ValidationError(f"{name} has no effect with suffix.", param=name)
        return Gap(request.prompt, request.suffix)
    if request.raw:
        if request.system:
            raise ValidationError("system has no effect with raw.", param="system")
        return request.prompt
    messages = [{"role": "system", "content": request.system}] if request.system else []
    asked = [*messages, {"role": "user", "content": request.prompt}]
    return Chat(messages=asked, variables=_variables(request), thinking=_thinking(request))


def _variables(request: ChatRequest | GenerateRequest) -> dict[str, Any]:
    return {} if request.think is None else {"enable_thinking": request.think is not False}


def _thinking(request: ChatRequest | GenerateRequest) -> Thinking:
    return Thinking(effort=request.think if isinstance(request.think, str) else None, param="think")


def _grammar(request: ChatRequest | GenerateRequest) -> GrammarSpec | None:
    if isinstance(request.format, dict):
        return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(request.format), param="format")
    return GrammarSpec(GrammarKind.JSON_OBJECT, param="format") if request.format else None


def sampling_of(request: ChatRequest | GenerateRequest, max_model_len: int) -> SamplingParams:
    """Raises ValidationError. max_model_len: what num_ctx may ask for at most."""
    options = request.options or Options()
    if options.num_ctx is not None and not 0 < options.num_ctx <= max_model_len:
        raise ValidationError(
            f"options.num_ctx must be 1 to {max_model_len}, the context that is served.", param="options.num_ctx"
        )
    num_predict = options.num_predict
    given: dict[str, Any] = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "seed": options.seed,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "repetition_penalty": options.repeat_penalty,
        "max_tokens": None if num_predict in (-1, -2) else num_predict,
        "grammar": _grammar(request),
    }
    if options.stop:
        given["stop"] = (options.stop,) if isinstance(options.stop, str) else tuple(options.stop)
    sampling = SamplingParams(**{**_DEFAULTS, **{name: value for name, value in given.items() if value is not None}})
    try:
        sampling.validate()
    except ValidationError as error:
        name = {"max_tokens": "num_predict", "repetition_penalty": "repeat_penalty"}.get(error.param or "", error.param)
        message = error.message.replace(error.param or "", name or "", 1)
        raise ValidationError(f"options.{message}", param=f"options.{name}") from None
    return sampling
