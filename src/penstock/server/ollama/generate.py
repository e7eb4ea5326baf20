"""POST /api/chat and /api/generate: Ollama's format in and out, one JSON object a line."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from penstock.frontend.fill_in_middle import Gap
from penstock.frontend.output import TextOutput
from penstock.frontend.parsers.parts import (
    CallArguments,
    CallStart,
    MessagePart,
    ParseWarning,
    Part,
    Reasoning,
    ToolCall,
    merge_parts,
)
from penstock.frontend.processor import Chat
from penstock.messages import ErrorInfo
from penstock.server.body import ignored_fields
from penstock.server.exchange import JSON_LINES, Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.ollama import decode
from penstock.server.ollama.schema import ChatRequest, GenerateRequest
from penstock.server.state import ServerState
from penstock.server.text import GenerationRequest

encode: Final = msgspec.json.Encoder().encode
_NS: Final = 1_000_000_000


def error_body(error: ErrorInfo) -> bytes:
    return encode({"error": error.message})


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def model_name(state: ServerState, name: str) -> str:
    """The served name that a client means; Ollama's clients add `:latest`. Raises UnknownModelError."""
    bare = name.removesuffix(":latest")
    state.check_model(bare if bare in state.model_names else name)
    return bare if bare in state.model_names else name


class OllamaErrors:
    """How a wire format of Ollama says errors, before an answer has begun and after."""

    def error_body(self, error: ErrorInfo) -> bytes:
        return error_body(error)

    def error_event(self, error: ErrorInfo) -> bytes:
        return error_body(error) + b"\n"


class OllamaFormat(OllamaErrors):
    """The wire format of one of the two endpoints. `stream` is on where it is not given, as with Ollama."""

    def __init__(self, state: ServerState, endpoint: str) -> None:
        self._state = state
        self.endpoint = endpoint
        self._is_chat = endpoint == "ollama_chat"

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask | bytes:
        """An empty request only asks for the model to be loaded. Raises ValidationError, UnknownModelError."""
        state, lenient = self._state, self._state.settings.lenient
        request: ChatRequest | GenerateRequest
        source: Chat | str | Gap
        if self._is_chat:
            request, ignored = decode.decode_chat(body, lenient=lenient)
            source, is_empty = decode.chat_of(request), not request.messages
        else:
            request, ignored = decode.decode_generate(body, lenient=lenient)
            source, is_empty = decode.prompt_of(request), not (request.prompt or request.suffix)
        model_name(state, request.model)
        wrap = _chat_fields if self._is_chat else _generate_fields
        if is_empty:
            head = {"model": request.model, "created_at": timestamp(state.now_s())}
            return encode({**head, **wrap("", "", []), "done": True, "done_reason": "load"})
        assert state.engine is not None
        timeout_s = exchange.timeout_s(state.settings.request_timeout)
        exchange.stream_type = JSON_LINES
        generation = GenerationRequest(
            request_id=state.new_id(),
            prompts=[source],
            sampling=decode.sampling_of(request, state.engine.ready.max_model_len),
            arrival_s=arrival_s,
            deadline_s=arrival_s + timeout_s,
        )
        answer = OllamaAnswer(state, request.model, wrap, ignored, arrival_s)
        return Ask(generation, answer, request.stream is not False)


# content, reasoning and calls as the fields of one object
Wrap = Callable[[str, str, Sequence[ToolCall]], dict[str, Any]]


def _chat_fields(content: str, reasoning: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if reasoning:
        message["thinking"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"function": {"name": call.name, "arguments": msgspec.Raw(call.arguments.encode())}} for call in calls
        ]
    return {"message": message}


def _generate_fields(content: str, reasoning: str, _calls: Sequence[ToolCall]) -> dict[str, Any]:
    return {"response": content, "thinking": reasoning} if reasoning else {"response": content}


class OllamaAnswer:
    """Renders one answer, a line for each delta or one object with everything."""

    def __init__(self, state: ServerState, model: str, wrap: Wrap, ignored: Sequence[str], arrival_s: float) -> None:
        self._state = state
        self._model = model
        self._wrap = wrap
        self._ignored = ignored_fields(ignored)
        self._arrival_s = arrival_s
        self._last: Choice | None = None
        self._call: list[Part] = []  # in the making: Ollama's calls are objects, and come whole

    def event(self, choice: Choice, delta: TextOutput) -> bytes:
        self._last = choice
        parts: Sequence[Part] = delta.parts if delta.parts is not None else ((delta.text,) if delta.text else ())
        lines: list[bytes] = []
        for part in parts:
            if isinstance(part, ParseWarning):
                continue
            self._call.append(part)
            if not isinstance(part, (CallStart, CallArguments)):
                message, self._call = merge_parts(self._call), []
                lines.append(encode({**self._head(), **self._fields(message), "done": False}) + b"\n")
        return b"".join(lines)

    def last_events(self, usage: Usage) -> bytes:
        assert self._last is not None
        return encode(self._end(self._wrap("", "", []), self._last, usage)) + b"\n"

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        return encode(self._end(self._fields(choices[0].message), choices[0], usage))

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": timestamp(self._state.now_s())}

    def _fields(self, parts: Sequence[MessagePart]) -> dict[str, Any]:
        """A call that is not complete is no object: it stays text."""
        content: list[str] = []
        for part in parts:
            if isinstance(part, str):
                content.append(part)
            elif isinstance(part, ToolCall) and not part.is_complete:
                content.append(part.name + part.arguments)
        return self._wrap(
            "".join(content),
            "".join(part.text for part in parts if isinstance(part, Reasoning)),
            [part for part in parts if isinstance(part, ToolCall) and part.is_complete],
        )

    def _end(self, fields: dict[str, Any], choice: Choice, usage: Usage) -> dict[str, Any]:
        now_s = time.monotonic()
        first_s = choice.first_token_s or now_s
        scheduled_s = choice.scheduled_s or self._arrival_s
        warnings = self._ignored + [{"code": one.kind, "message": one.detail} for one in choice.warnings]
        return {
            **self._head(),
            **fields,
            "done": True,
            "done_reason": "length" if choice.finish_reason == "length" else "stop",
            "total_duration": int((now_s - self._arrival_s) * _NS),
            "load_duration": 0,
            "prompt_eval_count": usage.num_prompt_tokens,
            "prompt_eval_duration": int(max(0.0, first_s - scheduled_s) * _NS),
            "eval_count": usage.num_output_tokens,
            "eval_duration": int(max(0.0, now_s - first_s) * _NS),
            **({"warnings": warnings} if warnings else {}),
        }
