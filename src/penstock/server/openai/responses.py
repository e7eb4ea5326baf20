"""POST /v1/responses: OpenAI's stateful format in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from penstock.frontend.output import TextOutput
from penstock.frontend.parsers.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    MessagePart,
    ParseWarning,
    Part,
    Reasoning,
    ToolCall,
    merge_parts,
)
from penstock.messages import ErrorInfo
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.inner_call import RESPONSE_ID_KEY
from penstock.server.openai import render
from penstock.server.openai import response_decode as decode
from penstock.server.openai.response_routes import Responses
from penstock.server.openai.response_schema import InputItem, ResponseRequest
from penstock.server.openai.response_store import StoredResponse
from penstock.server.state import ServerState
from penstock.server.text import GenerationRequest

encode: Final = render.encode


class ResponsesFormat(render.OpenAIErrors):
    """The wire format of the endpoint."""

    endpoint = "responses"

    def __init__(self, state: ServerState, responses: Responses) -> None:
        self._state = state
        self._responses = responses

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask | bytes:
        """Raises ValidationError, UnknownModelError, UnknownResponseError."""
        state = self._state
        request, items, ignored = decode.decode_request(body, lenient=state.settings.lenient)
        state.check_model(request.model)
        messages: decode.Messages = []
        if request.previous_response_id is not None:
            messages = msgspec.json.decode(self._responses.finished(request.previous_response_id).messages)
        messages += decode.messages_of(items)
        timeout_s = exchange.timeout_s(state.settings.request_timeout)
        generation = GenerationRequest(
            request_id=state.new_id(),
            prompts=[decode.chat_of(request, messages)],
            sampling=decode.sampling_of(request),
            arrival_s=arrival_s,
            deadline_s=arrival_s + timeout_s,
        )
        inner_id = exchange.scope.get(RESPONSE_ID_KEY)
        response_id = inner_id or f"resp_{exchange.request_id}"
        answer = ResponseAnswer(state, self._responses, response_id, request, items, messages, ignored)
        if request.background and inner_id is None:
            return self._responses.begin(answer.unfinished("queued"), body)
        return Ask(generation, answer, bool(request.stream), request.user or "", request.metadata or {})

    def error_event(self, error: ErrorInfo) -> bytes:
        event = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return b"event: error\ndata: " + encode({**event, "sequence_number": -1}) + b"\n\n"


class ResponseAnswer:
    """Renders one response. Items follow the order in which the model wrote its parts."""

    def __init__(
        self,
        state: ServerState,
        responses: Responses,
        response_id: str,
        request: ResponseRequest,
        items: list[InputItem],
        messages: decode.Messages,
        ignored: Sequence[str],
    ) -> None:
        """messages: the conversation with this request's input."""
        self._responses = responses
        self._id = response_id
        self._created_s = int(state.now_s())
        self._request = request
        self._items = items
        self._messages = messages
        self._ignored = render.ignored_warnings(ignored)
        self._sequence = 0
        self._parts: list[Part] = []  # of a stream
        self._index = -1  # of the open item, or the last one
        self._open: type | None = None  # what the open item holds
        self._open_parts: list[Part] = []
        self._delta_head = b""
        self._choice: Choice | None = None

    # The whole

    def unfinished(self, status: str) -> StoredResponse:
        """The response before it has any output."""
        body = encode(self._response(status, [], None))
        return StoredResponse(self._id, body, encode(self._items), b"[]", is_done=False)

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        return encode(self._finish(choices[0], choices[0].message, usage))

    def _finish(self, choice: Choice, parts: Sequence[MessagePart], usage: Usage) -> dict[str, Any]:
        """The finished response, stored unless the client does not want it to be."""
        status = "incomplete" if choice.finish_reason == "length" else "completed"
        output = [self._item(part, index) for index, part in enumerate(parts)]
        response = self._response(status, output, usage)
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        warnings = self._ignored + [render.WarningBody(one.kind, one.detail) for one in choice.warnings]
        if warnings:
            response["warnings"] = warnings
        if self._request.store is not False:
            call_ids = [item["call_id"] for item in output if item["type"] == "function_call"]
            messages = [*self._messages, decode.answer_message(parts, call_ids)]
            stored = StoredResponse(self._id, encode(response), encode(self._items), encode(messages))
            self._responses.put(stored)
        return response

    def _response(self, status: str, output: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        request = self._request
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "background": bool(request.background),
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": request.store is not False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": _text_format(request)},
            "tool_choice": request.tool_choice or "auto",
            "tools": [_tool_body(tool) for tool in request.tools or ()],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": request.user,
        }

    def _item(self, part: MessagePart, index: int) -> dict[str, Any]:
        if isinstance(part, str):
            content = [{"type": "output_text", "text": part, "annotations": [], "logprobs": []}]
            return {**self._started_item(str, index), "status": "completed", "content": content}
        if isinstance(part, Reasoning):
            content = [{"type": "reasoning_text", "text": part.text}]
            return {**self._started_item(Reasoning, index), "content": content}
        assert isinstance(part, ToolCall)
        started = self._started_call(part, index)
        return {**started, "arguments": part.arguments, "status": "completed" if part.is_complete else "incomplete"}

    def _started_item(self, kind: type, index: int) -> dict[str, Any]:
        if kind is Reasoning:
            return {"id": self._item_id("rs", index), "type": "reasoning", "summary": [], "content": []}
        return {
            "id": self._item_id("msg", index),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }

    def _started_call(self, call: CallStart | ToolCall, index: int) -> dict[str, Any]:
        return {
            "id": self._item_id("fc", index),
            "type": "function_call",
            "call_id": call.call_id or self._item_id("call", index),
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }

    def _item_id(self, prefix: str, index: int) -> str:
        return f"{prefix}_{self._id.removeprefix('resp_')}_{index}"

    # The stream

    def event(self, choice: Choice, delta: TextOutput) -> bytes:
        parts: Sequence[Part] = delta.parts if delta.parts is not None else ((delta.text,) if delta.text else ())
        events: list[bytes] = []
        if self._choice is None:
            self._choice = choice
            begun = {"response": self._response("in_progress", [], None)}
            events += [self._event(f"response.{kind}", begun) for kind in ("created", "in_progress")]
        for part in parts:
            if isinstance(part, (CallStart, CallArguments, CallEnd)):
                self._add_call(part, events)
            elif not isinstance(part, ParseWarning):
                if self._open is not type(part):
                    self._close(events)
                    self._start(type(part), events)
                self._add_text(part, events)
            self._parts.append(part)
        if delta.finish_reason is not None:
            self._close(events)
        return b"".join(events)

    def last_events(self, usage: Usage) -> bytes:
        assert self._choice is not None
        parts = [part for part in merge_parts(self._parts) if not isinstance(part, ParseWarning)]
        response = self._finish(self._choice, parts, usage)
        return self._event(f"response.{response['status']}", {"response": response})

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        data = encode({"type": name, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"

    def _place(self, item_id: str) -> dict[str, Any]:
        return {"item_id": item_id, "output_index": self._index, "content_index": 0}

    def _start(self, kind: type, events: list[bytes]) -> None:
        self._index += 1
        self._open, self._open_parts = kind, []
        item = self._started_item(kind, self._index)
        events.append(self._event("response.output_item.added", {"output_index": self._index, "item": item}))
        fields: dict[str, Any] = self._place(item["id"])
        if kind is str:
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            name, extra = "response.output_text.delta", b',"logprobs":[]'
        else:
            part = {"type": "reasoning_text", "text": ""}
            name, extra = "response.reasoning_text.delta", b""
        events.append(self._event("response.content_part.added", {**fields, "part": part}))
        head = f'event: {name}\ndata: {{"type":"{name}","item_id":"{item["id"]}","output_index":{self._index},'
        self._delta_head = head.encode() + b'"content_index":0' + extra + b',"sequence_number":'

    def _add_text(self, part: str | Reasoning, events: list[bytes]) -> None:
        text = part if isinstance(part, str) else part.text
        self._open_parts.append(part)
        events.append(self._delta_head + b"%d" % self._sequence + b',"delta":' + encode(text) + b"}\n\n")
        self._sequence += 1

    def _close(self, events: list[bytes]) -> None:
        if self._open is None:
            return
        self._open = None
        (part,) = merge_parts(self._open_parts)
        item = self._item(part, self._index)
        fields, (content,) = self._place(item["id"]), item["content"]
        done: dict[str, Any] = {**fields, "text": content["text"]}
        if isinstance(part, str):
            events.append(self._event("response.output_text.done", {**done, "logprobs": []}))
        else:
            events.append(self._event("response.reasoning_text.done", done))
        events.append(self._event("response.content_part.done", {**fields, "part": content}))
        events.append(self._event("response.output_item.done", {"output_index": self._index, "item": item}))

    def _add_call(self, part: CallStart | CallArguments | CallEnd, events: list[bytes]) -> None:
        if isinstance(part, CallStart):
            self._close(events)
            self._index += 1
            self._open_parts = []
            started = self._started_call(part, self._index)
            events.append(self._event("response.output_item.added", {"output_index": self._index, "item": started}))
        self._open_parts.append(part)
        place: dict[str, Any] = {"item_id": self._item_id("fc", self._index), "output_index": self._index}
        if isinstance(part, CallArguments):
            events.append(self._event("response.function_call_arguments.delta", {**place, "delta": part.text}))
        elif isinstance(part, CallEnd):
            (call,) = merge_parts(self._open_parts)
            item = self._item(call, self._index)
            done = {**place, "arguments": item["arguments"], "name": item["name"]}
            events.append(self._event("response.function_call_arguments.done", done))
            events.append(self._event("response.output_item.done", {"output_index": self._index, "item": item}))


def _tool_body(tool: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": False,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }


def _text_format(request: ResponseRequest) -> dict[str, Any]:
    """As the client gave it, without what it left out."""
    wanted = request.text.format if request.text is not None else None
    return (
        {"type": "text"}
        if wanted is None
        else {name: getattr(wanted, name) for name in wanted.__struct_fields__ if getattr(wanted, name) is not None}
    )
