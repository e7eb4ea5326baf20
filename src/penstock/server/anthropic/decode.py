"""From a raw body to a conversation and sampling parameters: every refusal names the field. Pure."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from penstock.base.errors import ValidationError
from penstock.frontend.processor import CallRule, Chat, Thinking
from penstock.messages import GrammarKind, GrammarSpec, SamplingParams
from penstock.messages.bounds import MAX_ENTRIES
from penstock.messages.sampling import check_bound
from penstock.server.anthropic.schema import (
    NO_OP_VALUES,
    CountTokensRequest,
    Message,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from penstock.server.body import decode_body

MIN_THINKING_TOKENS: Final = 1024  # Anthropic's
MAX_BREAKPOINTS: Final = 4  # Anthropic's
_TTL_S: Final = {None: 300.0, "5m": 300.0, "1h": 3600.0}
_messages_decoder = msgspec.json.Decoder(MessagesRequest)
_count_decoder = msgspec.json.Decoder(CountTokensRequest)


def decode_messages(body: bytes, *, lenient: bool) -> tuple[MessagesRequest, list[str]]:
    """The request and the unknown fields that were ignored. Raises ValidationError."""
    request, ignored = decode_body(_messages_decoder, body, lenient=lenient)
    _check(request)
    thinking = request.thinking
    if thinking is not None and thinking.type == "enabled":
        budget = thinking.budget_tokens
        if budget is None or not MIN_THINKING_TOKENS <= budget < request.max_tokens:
            raise ValidationError(
                f"thinking.budget_tokens must be {MIN_THINKING_TOKENS} to below max_tokens.",
                param="thinking.budget_tokens",
            )
    return request, ignored


def decode_count(body: bytes, *, lenient: bool) -> tuple[CountTokensRequest, list[str]]:
    """The request and the unknown fields that were ignored. Raises ValidationError."""
    request, ignored = decode_body(_count_decoder, body, lenient=lenient)
    _check(request)
    return request, ignored


def _check(request: MessagesRequest | CountTokensRequest) -> None:
    for name, allowed in NO_OP_VALUES.items():
        value = getattr(request, name, None)
        if value is not None and value not in allowed:
            raise ValidationError(f"{name} is not supported with this value.", remedy="Leave it out.", param=name)
    if not request.messages:
        raise ValidationError("messages is empty.", param="messages")
    for name in ("messages", "tools"):
        if len(getattr(request, name) or ()) > MAX_ENTRIES[name]:
            raise ValidationError(f"{name} has more than {MAX_ENTRIES[name]} entries.", param=name)
    for index, tool in enumerate(request.tools or ()):
        for name in ("input_examples", "defer_loading", "eager_input_streaming", "allowed_callers"):
            value = getattr(tool, name)
            if value is not None and value is not False and value != []:
                param = f"tools[{index}].{name}"
                raise ValidationError(f"{param} is not supported with this value.", param=param)
    _check_tool_choice(request)


def _check_tool_choice(request: MessagesRequest | CountTokensRequest) -> None:
    choice = request.tool_choice
    if choice is None:
        return
    if (choice.type == "tool") != (choice.name is not None):
        raise ValidationError("tool_choice.name is given exactly where the type is tool.", param="tool_choice.name")
    if choice.type != "none" and not request.tools:
        raise ValidationError("tool_choice needs tools.", param="tool_choice")


def chat_of(request: MessagesRequest | CountTokensRequest) -> Chat:
    """The conversation in the shape that chat templates know. A last assistant message is continued."""
    messages: list[dict[str, Any]] = []
    system = _text_of(request.system)
    if system:
        messages.append({"role": "system", "content": system})
    counts = []  # of template messages, up to and with each of the request's
    for message in request.messages:
        messages += _template_messages(message)
        counts.append(len(messages))
    shows_tools = request.tools and (request.tool_choice is None or request.tool_choice.type != "none")
    tools = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
            | ({"strict": True} if tool.strict else {}),
        }
        for tool in request.tools or ()
    ]
    is_continued = messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
    variables: dict[str, Any] = {}
    if request.thinking is not None:
        variables["enable_thinking"] = request.thinking.type != "disabled"
    return Chat(
        messages=messages,
        tools=tools if shows_tools else None,
        add_generation_prompt=not is_continued,
        continue_final_message=is_continued,
        variables=variables,
        call_rule=_call_rule(request, tools) if shows_tools else None,
        thinking=_thinking(request),
        breakpoints=_breakpoints(request, counts),
    )


def _thinking(request: MessagesRequest | CountTokensRequest) -> Thinking:
    effort = request.output_config.effort if request.output_config is not None else None
    if effort is not None:
        return Thinking(effort=effort, param="output_config.effort")
    budget = request.thinking.budget_tokens if request.thinking is not None else None
    return Thinking(budget, param="thinking.budget_tokens")


def _breakpoints(request: MessagesRequest | CountTokensRequest, counts: list[int]) -> list[tuple[int, float]]:
    """Where cache_control stands: the last place for each time. A block in a message counts as the message's end."""
    marks = [(0, tool.cache_control) for tool in request.tools or ()]
    if isinstance(request.system, list):
        marks += [(0, block.cache_control) for block in request.system]
    for count, message in zip(counts, request.messages, strict=True):
        if isinstance(message.content, list):
            marks += [(count, block.cache_control) for block in message.content]
    found = [(count, _TTL_S[control.ttl]) for count, control in marks if control is not None]
    if len(found) > MAX_BREAKPOINTS:
        raise ValidationError(f"cache_control may stand in {MAX_BREAKPOINTS} places.", param="cache_control")
    if request.cache_control is not None:
        found.append((counts[-1], _TTL_S[request.cache_control.ttl]))
    return [(count, ttl_s) for ttl_s, count in {ttl_s: count for count, ttl_s in found}.items()]


def _call_rule(request: MessagesRequest | CountTokensRequest, tools: list[dict[str, Any]]) -> CallRule | None:
    choice = request.tool_choice
    has_grammar = _grammar(request) is not None
    if choice is None:
        return CallRule.of(tools, has_grammar=has_grammar)
    return CallRule.of(
        tools,
        is_required=choice.type == "any",
        only=choice.name,
        is_parallel=not choice.disable_parallel_tool_use,
        has_grammar=has_grammar,
    )


def _grammar(request: MessagesRequest | CountTokensRequest) -> GrammarSpec | None:
    """output_format is the older name of output_config.format."""
    wanted, param = request.output_format, "output_format.schema"
    if request.output_config is not None and request.output_config.format is not None:
        if wanted is not None:
            raise ValidationError("output_format and output_config.format are the same.", param="output_format")
        wanted, param = request.output_config.format, "output_config.format.schema"
    return None if wanted is None else GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(wanted.schema), param=param)


def _text_of(content: str | list[TextBlock] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(block.text for block in content)


def _template_messages(message: Message) -> list[dict[str, Any]]:
    """One message as one or more: each tool result is a message of its own to a template."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in message.content:
        match block:
            case TextBlock(text=text):
                texts.append(text)
            case ThinkingBlock(thinking=thinking):
                reasoning.append(thinking)
            case ToolUseBlock(id=call_id, name=name, input=arguments):
                function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
                calls.append({"id": call_id, "type": "function", "function": function})
            case ToolResultBlock(tool_use_id=call_id, content=content):
                found.append({"role": "tool", "tool_call_id": call_id, "content": _text_of(content)})
    if (calls or reasoning) and message.role != "assistant":
        raise ValidationError("Only an assistant's message has tool_use and thinking blocks.", param="messages")
    if found and message.role != "user":
        raise ValidationError("Only a user's message has tool_result blocks.", param="messages")
    if texts or calls or reasoning or not found:
        entry: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
        if calls:
            entry["tool_calls"] = calls
        if reasoning:
            entry["reasoning_content"] = "\n".join(reasoning)
        found.append(entry)
    return found


def sampling_of(request: MessagesRequest) -> SamplingParams:
    """Raises ValidationError."""
    check_bound("max_tokens", request.max_tokens)
    if request.temperature is not None and not 0.0 <= request.temperature <= 1.0:
        raise ValidationError("temperature must be between 0 and 1.", param="temperature")
    given: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": tuple(request.stop_sequences) if request.stop_sequences else None,
        "grammar": _grammar(request),
    }
    sampling = SamplingParams(**{name: value for name, value in given.items() if value is not None})
    try:
        sampling.validate()
    except ValidationError as error:
        raise ValidationError(error.message.replace("stop", "stop_sequences"), param=error.param) from None
    return sampling
