"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's format in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from penstock.frontend.output import TextOutput
from penstock.frontend.parsers.json_scanner import completed_object
from penstock.frontend.parsers.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    ParseWarning,
    Part,
    Reasoning,
    ToolCall,
)
from penstock.messages import ErrorInfo
from penstock.server.anthropic import decode
from penstock.server.body import ignored_fields, with_ignored
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.state import ServerState
from penstock.server.text import GenerationRequest

encode: Final = msgspec.json.Encoder().encode
_ERROR_TYPES: Final = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
Pins = tuple[tuple[int, float], ...]  # leading tokens of the prompt that are kept, and for how many seconds
_STOP_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def error_body(error: ErrorInfo) -> bytes:
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return encode({"type": "error", "error": {"type": kind, "message": error.message}})


class MessagesFormat:
    """The wire format of the messages endpoint."""

    endpoint = "messages"

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask:
        """Raises ValidationError, UnknownModelError."""
        state = self._state
        request, ignored = decode.decode_messages(body, lenient=state.settings.lenient)
        state.check_model(request.model)
        timeout_s = exchange.timeout_s(state.settings.request_timeout)
        generation = GenerationRequest(
            request_id=state.new_id(),
            prompts=[decode.chat_of(request)],
            sampling=decode.sampling_of(request),
            arrival_s=arrival_s,
            deadline_s=arrival_s + timeout_s,
        )
        answer = MessagesAnswer(exchange.request_id, request.model, ignored)
        user = (request.metadata.user_id or "") if request.metadata is not None else ""
        return Ask(generation, answer, bool(request.stream), user)

    def error_body(self, error: ErrorInfo) -> bytes:
        return error_body(error)

    def error_event(self, error: ErrorInfo) -> bytes:
        return _event("error", error_body(error))


def _event(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


class MessagesAnswer:
    """Renders one message. Blocks follow the order in which the model wrote its parts."""

    def __init__(self, request_id: str, model: str, ignored: Sequence[str]) -> None:
        self._id = f"msg_{request_id}"
        self._call_id = f"toolu_{request_id}"
        self._model = model
        self._ignored = ignored_fields(ignored)
        self._is_started = False
        self._index = -1  # of the open block, or the last one
        self._open: type | None = None  # what the open block holds
        self._num_calls = 0
        self._pins: Pins = ()
        self._delta_head = b""
        self._delta_tail = b""

    def event(self, choice: Choice, delta: TextOutput) -> bytes:
        if delta.parts is None:
            parts: Sequence[Part] = (delta.text,) if delta.text else ()
        else:
            parts = delta.parts
        if self._open is str and len(parts) == 1 and isinstance(parts[0], str) and delta.finish_reason is None:
            return self._delta_head + encode(parts[0]) + self._delta_tail
        events: list[bytes] = []
        if not self._is_started:
            self._is_started = True
            self._pins = choice.sequenced.prompt.pins
            usage = Usage(len(choice.sequenced.request.prompt_token_ids), delta.num_cached_tokens, 0)
            start = self._message([], None, None, usage, [])
            events.append(_event("message_start", encode({"type": "message_start", "message": start})))
        for part in parts:
            self._add(part, events)
        if delta.finish_reason is not None:
            self._close(events)
            stop_reason, stop_sequence = _stop(choice)
            self._end: dict[str, Any] = {
                "type": "message_delta",
                "delta": {"stop_reason": stop_reason, "stop_sequence": stop_sequence, "stop_details": None},
                **self._with_warnings(choice.warnings),
            }
        return b"".join(events)

    def last_events(self, usage: Usage) -> bytes:
        end = {**self._end, "usage": _usage(usage, self._pins)}
        return _event("message_delta", encode(end)) + _event("message_stop", b'{"type":"message_stop"}')

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        choice = choices[0]
        self._pins = choice.sequenced.prompt.pins
        content: list[dict[str, Any]] = []
        for part in choice.message:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            elif isinstance(part, Reasoning):
                content.append({"type": "thinking", "thinking": part.text, "signature": ""})
            elif isinstance(part, ToolCall):
                # What a client's partial reader makes of the same stream.
                arguments = part.arguments if part.is_complete else completed_object(part.arguments)
                content.append({**self._tool_block(part), "input": msgspec.Raw(arguments.encode())})
        return encode(self._message(content, *_stop(choice), usage, choice.warnings))

    def _add(self, part: Part, events: list[bytes]) -> None:
        if isinstance(part, str):
            self._add_text(part, str, '{"type":"text","text":""}', "text_delta", "text", events)
        elif isinstance(part, Reasoning):
            block = '{"type":"thinking","thinking":"","signature":""}'
            self._add_text(part.text, Reasoning, block, "thinking_delta", "thinking", events)
        elif isinstance(part, CallStart):
            self._close(events)
            block = encode({**self._tool_block(part), "input": {}}).decode()
            self._start(block, "input_json_delta", "partial_json", events)
            self._open = ToolCall
        elif isinstance(part, CallArguments):
            events.append(self._delta_head + encode(part.text) + self._delta_tail)
        elif isinstance(part, CallEnd):
            self._close(events)

    def _add_text(self, text: str, kind: type, block: str, delta: str, field: str, events: list[bytes]) -> None:
        if self._open is not kind:
            self._close(events)
            self._start(block, delta, field, events)
            self._open = kind
        events.append(self._delta_head + encode(text) + self._delta_tail)

    def _start(self, block: str, delta: str, field: str, events: list[bytes]) -> None:
        self._index += 1
        start = f'{{"type":"content_block_start","index":{self._index},"content_block":{block}}}'
        events.append(_event("content_block_start", start.encode()))
        head = f'{{"type":"content_block_delta","index":{self._index},"delta":{{"type":"{delta}","{field}":'
        self._delta_head = b"event: content_block_delta\ndata: " + head.encode()
        self._delta_tail = b"}}\n\n"

    def _close(self, events: list[bytes]) -> None:
        if self._open is not None:
            self._open = None
            stop = f'{{"type":"content_block_stop","index":{self._index}}}'
            events.append(_event("content_block_stop", stop.encode()))

    def _tool_block(self, call: CallStart | ToolCall) -> dict[str, Any]:
        self._num_calls += 1
        call_id = call.call_id or f"{self._call_id}_{self._num_calls - 1}"
        return {"type": "tool_use", "id": call_id, "name": call.name}

    def _message(
        self,
        content: list[dict[str, Any]],
        stop_reason: str | None,
        stop_sequence: str | None,
        usage: Usage,
        warnings: Sequence[ParseWarning],
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "stop_details": None,
            "usage": _usage(usage, self._pins),
            **self._with_warnings(warnings),
        }

    def _with_warnings(self, warnings: Sequence[ParseWarning]) -> dict[str, Any]:
        """Our addition to Anthropic's format, where there is something to say."""
        found = self._ignored + [{"code": warning.kind, "message": warning.detail} for warning in warnings]
        return {"warnings": found} if found else {}


def _stop(choice: Choice) -> tuple[str, str | None]:
    """(stop_reason, stop_sequence)."""
    if isinstance(choice.stop_reason, str) and choice.finish_reason == "stop":
        return "stop_sequence", choice.stop_reason
    return _STOP_REASONS[choice.finish_reason], None


def _usage(usage: Usage, pins: Pins) -> dict[str, Any]:
    """As with Anthropic: what was found cached, what of the rest was marked to be kept, and what is left."""
    created: dict[float, int] = {}
    end = usage.num_cached_tokens
    for num_tokens, ttl_s in sorted(pins):
        created[ttl_s] = max(0, num_tokens - end)
        end = max(end, num_tokens)
    fields = {
        "input_tokens": usage.num_prompt_tokens - end,
        "cache_creation_input_tokens": end - usage.num_cached_tokens,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_output_tokens,
    }
    if not pins:
        return fields
    names = (("ephemeral_5m_input_tokens", 300.0), ("ephemeral_1h_input_tokens", 3600.0))
    return {**fields, "cache_creation": {name: created.get(ttl_s, 0) for name, ttl_s in names}}


class CountTokens:
    """POST /v1/messages/count_tokens."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def __call__(self, body: bytes, _exchange: Exchange) -> object:
        _, text = self._state.parts()
        request, ignored = decode.decode_count(body, lenient=self._state.settings.lenient)
        self._state.check_model(request.model)
        prompt = await text.prompt(decode.chat_of(request))
        return with_ignored({"input_tokens": len(prompt.token_ids)}, ignored)
