"""POST /v1/chat/completions: OpenAI's chat format in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.base.errors import ValidationError
from penstock.frontend.output import LogprobEntry, TextOutput
from penstock.frontend.parsers.parts import CallArguments, CallStart, Reasoning, ToolCall
from penstock.frontend.processor import Chat, Thinking
from penstock.messages.sampling import check_bound
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.openai import decode, render
from penstock.server.openai.constraints import call_rule
from penstock.server.openai.schema import ChatRequest
from penstock.server.state import ServerState
from penstock.server.text import GenerationRequest


class _Function(msgspec.Struct):
    name: str
    arguments: str


class _ToolCall(msgspec.Struct):
    id: str
    function: _Function
    type: str = "function"


class _ToolCallDelta(msgspec.Struct):
    index: int
    id: str
    function: _Function
    type: str = "function"


class _Choice(msgspec.Struct, omit_defaults=True):
    index: int
    message: dict[str, Any]
    logprobs: render.ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None = None
    warnings: list[render.WarningBody] | None = None


class _Body(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[_Choice]
    usage: render.UsageBody
    system_fingerprint: str
    prompt_logprobs: list[dict[int, render.PromptLogprob] | None] | None = None


class ChatFormat(render.OpenAIErrors):
    """The wire format of the chat endpoint."""

    endpoint = "chat"

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask:
        """Raises ValidationError, UnknownModelError."""
        state = self._state
        request, ignored = decode.decode_chat(body, lenient=state.settings.lenient)
        state.check_model(request.model)
        state.check_priority(request.priority)
        timeout_s = exchange.timeout_s(state.settings.request_timeout)
        is_stream = bool(request.stream)
        if is_stream and request.prompt_logprobs is not None:
            raise ValidationError("prompt_logprobs is not supported with stream.", param="prompt_logprobs")
        generation = GenerationRequest(
            request_id=state.new_id(),
            prompts=[chat_of(request)],
            sampling=decode.chat_sampling(request),
            beams=decode.beams_of(request),
            namespace=request.cache_salt or "",
            priority=request.priority or 0,
            arrival_s=arrival_s,
            deadline_s=arrival_s + timeout_s,
        )
        answer = ChatAnswer(state, exchange.request_id, request, ignored)
        return Ask(generation, answer, is_stream, request.user or "", request.metadata or {})


def chat_of(request: ChatRequest) -> Chat:
    """The conversation of a request. Raises ValidationError."""
    is_continued = bool(request.continue_final_message)
    generates = request.add_generation_prompt
    variables = request.chat_template_kwargs or {}
    if request.reasoning_effort == "none":
        variables = {"enable_thinking": False, **variables}
    return Chat(
        messages=decode.template_messages(request.messages),
        tools=request.tools if request.tools and request.tool_choice != "none" else None,
        add_generation_prompt=not is_continued if generates is None else generates,
        continue_final_message=is_continued,
        variables=variables,
        call_rule=call_rule(request),
        thinking=thinking_of(request),
    )


def thinking_of(request: ChatRequest) -> Thinking:
    """Raises ValidationError."""
    effort = None if request.reasoning_effort == "none" else request.reasoning_effort
    if request.thinking_token_budget is None:
        return Thinking(effort=effort, param="reasoning_effort")
    if effort is not None:
        raise ValidationError(
            "reasoning_effort and thinking_token_budget exclude each other.", param="thinking_token_budget"
        )
    check_bound("thinking_token_budget", request.thinking_token_budget)
    return Thinking(request.thinking_token_budget, param="thinking_token_budget")


class ChatAnswer:
    """Renders one chat answer, streamed or whole."""

    def __init__(self, state: ServerState, request_id: str, request: ChatRequest, ignored: Sequence[str]) -> None:
        self._id = f"chatcmpl-{request_id}"
        self._created = int(state.now_s())
        self._model = request.model
        self._fingerprint = state.system_fingerprint
        self._num_top = request.top_logprobs or 0
        self._ignored = render.ignored_warnings(ignored)
        self._num_calls: dict[int, int] = {}  # sent, by choice
        self._started: set[int] = set()
        if request.stream:
            options = request.stream_options
            self._includes_usage = bool(options is not None and options.include_usage)
            self._head = b'data: {"id":%s,"object":"chat.completion.chunk","created":%d,"model":%s,' % (
                render.encode(self._id), self._created, render.encode(request.model),
            ) + b'"system_fingerprint":%s,"choices":[' % render.encode(self._fingerprint)  # fmt: skip
            self._tail = b'],"usage":null}\n\n' if self._includes_usage else b"]}\n\n"
            # The two ends of the event that nearly every token becomes.
            self._text_head = self._head + b'{"index":0,"delta":{"content":'
            self._text_tail = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def event(self, choice: Choice, delta: TextOutput) -> bytes:
        """The server-sent events for a delta; empty when it has nothing to say yet."""
        text: object = delta.text
        if delta.parts is not None:
            text = delta.parts[0] if len(delta.parts) == 1 else None
        if (
            isinstance(text, str) and delta.finish_reason is None and delta.logprobs is None
            and choice.index == 0 and 0 in self._started
        ):  # fmt: skip
            return self._text_head + render.encode(text) + self._text_tail if text else b""
        if delta.parts is not None:
            return self._events_of_parts(choice, delta)
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return b""
        content = b'"content":' + render.encode(delta.text) if delta.text or not delta.finish_reason else b""
        return self._full_event(choice, content, delta.logprobs, delta.finish_reason)

    def last_events(self, usage: Usage) -> bytes:
        if not self._includes_usage:
            return render.DONE
        return self._head + b'],"usage":' + render.encode(render.usage_body(usage)) + b"}\n\n" + render.DONE

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        return render.encode(
            _Body(
                id=self._id,
                object="chat.completion",
                created=self._created,
                model=self._model,
                choices=[self._choice_body(choice) for choice in choices],
                usage=render.usage_body(usage),
                system_fingerprint=self._fingerprint,
                prompt_logprobs=render.prompt_logprobs(choices[0].prompt_logprobs),
            )
        )

    def _full_event(
        self, choice: Choice, inner: bytes, logprobs: Sequence[LogprobEntry] | None, finish_reason: str | None
    ) -> bytes:
        """An event with every field. inner: the members of `delta` beside the role."""
        if choice.index not in self._started:
            self._started.add(choice.index)
            inner = b'"role":"assistant"' + (b"," + inner if inner else b',"content":""')
        event = self._head + b'{"index":%d,"delta":{%s},"logprobs":%s,"finish_reason":%s' % (
            choice.index, inner, self._logprobs_bytes(logprobs), render.encode(finish_reason),
        )  # fmt: skip
        if finish_reason is not None and choice.stop_reason is not None:
            event += b',"stop_reason":' + render.encode(choice.stop_reason)
        if finish_reason is not None and (choice.warnings or self._ignored):
            event += b',"warnings":' + render.encode(self._warnings(choice))
        return event + b"}" + self._tail

    def _logprobs_bytes(self, logprobs: Sequence[LogprobEntry] | None) -> bytes:
        return b"null" if logprobs is None else render.encode(render.chat_logprobs(logprobs, self._num_top))

    def _events_of_parts(self, choice: Choice, delta: TextOutput) -> bytes:
        events: list[bytes] = []
        logprobs = delta.logprobs
        for part in delta.parts or ():
            if isinstance(part, str):
                inner = b'"content":' + render.encode(part)
            elif isinstance(part, Reasoning):
                inner = b'"reasoning_content":' + render.encode(part.text)
            elif isinstance(part, CallStart):
                inner = b'"tool_calls":' + render.encode([self._call_start(choice, part)])
            elif isinstance(part, CallArguments):
                inner = b'"tool_calls":[{"index":%d,"function":{"arguments":%s}}]' % (
                    self._num_calls[choice.index] - 1, render.encode(part.text),
                )  # fmt: skip
            else:
                continue  # warnings come with the end
            events.append(self._full_event(choice, inner, logprobs, None))
            logprobs = None
        if delta.finish_reason is not None or logprobs:
            finish_reason = choice.finish_reason if delta.finish_reason is not None else None
            events.append(self._full_event(choice, b"", logprobs, finish_reason))
        return b"".join(events)

    def _call_start(self, choice: Choice, call: CallStart) -> _ToolCallDelta:
        index = self._num_calls.get(choice.index, 0)
        self._num_calls[choice.index] = index + 1
        return _ToolCallDelta(index, self._call_id(choice, index, call), _Function(call.name, ""))

    def _call_id(self, choice: Choice, index: int, call: CallStart | ToolCall) -> str:
        return call.call_id or f"call_{self._id.removeprefix('chatcmpl-')}_{choice.index}_{index}"

    def _choice_body(self, choice: Choice) -> _Choice:
        parts = choice.message
        calls = [part for part in parts if isinstance(part, ToolCall)]
        content = "".join(part for part in parts if isinstance(part, str))
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [
                _ToolCall(self._call_id(choice, index, call), _Function(call.name, call.arguments))
                for index, call in enumerate(calls)
            ]
        logprobs = render.chat_logprobs(choice.logprobs, self._num_top) if choice.logprobs is not None else None
        warnings = self._warnings(choice) or None
        return _Choice(choice.index, message, logprobs, choice.finish_reason, choice.stop_reason, warnings)

    def _warnings(self, choice: Choice) -> list[render.WarningBody]:
        return self._ignored + [render.WarningBody(warning.kind, warning.detail) for warning in choice.warnings]
