"""Reads one HTTP/1.1 response, and the server-sent events in it, out of bytes as they come. No I/O, no clock.

Events are decoded as they arrive, into typed structs: that costs a few microseconds an event, and nothing piles up.
"""

from __future__ import annotations

import math
import textwrap
from typing import Any, Final

import msgspec

from penstock.bench.observation import Observation

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_BODY_BYTES: Final = 64 * 1024 * 1024
MAX_REFUSAL: Final = 300  # characters
_UNTIL_CLOSE: Final = -1


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = -1
    completion_tokens: int | None = -1
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class BrokenResponseError(Exception):
    """The bytes are no response that this client can read; the connection is of no more use."""


class ResponseReader:
    """One response. keeps_answer: also keeps its text and token ids (for conversations)."""

    __slots__ = (
        "_body",
        "_buffer",
        "_is_chunked",
        "_is_in_body",
        "_keeps_answer",
        "_left",
        "_num_untold",
        "_seen",
        "can_reuse",
        "seen",
    )

    def __init__(self, observation: Observation, keeps_answer: bool = False) -> None:
        self.seen = observation
        self.can_reuse = True
        self._keeps_answer = keeps_answer
        self._buffer = b""  # bytes of the head, or of an unfinished chunk
        self._body = b""  # bytes of an unfinished event, or of a body that is no stream
        self._is_in_body = False
        self._is_chunked = False
        self._left = _UNTIL_CLOSE
        self._seen = 0  # tokens in events so far, for servers that report usage with each
        self._num_untold = 0  # of these, what no event with output has stood for yet

    def feed(self, data: bytes, now_s: float) -> bool:
        """Takes what has come; whether the response is complete. Raises BrokenResponseError."""
        if not self._is_in_body:
            self._buffer += data
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise BrokenResponseError("endless headers")
                return False
            head, data = self._buffer[:end], self._buffer[end + 4 :]
            self._buffer = b""
            self._read_head(head)
        if self._is_chunked:
            return self._feed_chunks(data, now_s)
        if self._left != _UNTIL_CLOSE:
            data = data[: self._left]
            self._left -= len(data)
        self._feed_body(data, now_s)
        if self._left == 0:
            self._end_body(now_s)
        return self._left == 0

    def feed_eof(self, now_s: float) -> None:
        """The server closed the connection. Raises BrokenResponseError when that cut the response."""
        self.can_reuse = False
        if not self._is_in_body:
            raise BrokenResponseError("closed without a response")
        if self._is_chunked or self._left > 0:
            raise BrokenResponseError("cut off")
        self._end_body(now_s)

    def _read_head(self, head: bytes) -> None:
        status_line, *lines = head.split(b"\r\n")
        parts = status_line.split(None, 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
            raise BrokenResponseError("no HTTP response")
        self.seen.status = int(parts[1])
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        self._is_in_body = True
        self._is_chunked = headers.get(b"transfer-encoding", b"").lower().endswith(b"chunked")
        length = headers.get(b"content-length", b"")
        if not self._is_chunked and length.isdigit():
            self._left = int(length)
        self.seen.is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        has_end = self._is_chunked or self._left != _UNTIL_CLOSE
        self.can_reuse = has_end and headers.get(b"connection", b"").lower() != b"close" and parts[0] != b"HTTP/1.0"

    def _feed_chunks(self, data: bytes, now_s: float) -> bool:
        """Takes whole chunks off the buffer; True at the last one."""
        buffer = self._buffer + data if self._buffer else data
        place = 0
        while (line_end := buffer.find(b"\r\n", place)) >= 0:
            try:
                size = int(buffer[place:line_end].split(b";", 1)[0], 16)
            except ValueError:
                raise BrokenResponseError("malformed chunk") from None
            end = line_end + 2 + size
            if len(buffer) < end + 2:
                break
            if size == 0:
                self._end_body(now_s)
                return True
            self._feed_body(buffer[line_end + 2 : end], now_s)
            place = end + 2
        self._buffer = buffer[place:] if place else buffer
        if len(self._buffer) > MAX_BODY_BYTES:
            raise BrokenResponseError("endless chunk")
        return False

    def _feed_body(self, data: bytes, now_s: float) -> None:
        body = self._body + data if self._body else data
        self._body = b""
        if not self.seen.is_stream:
            if len(body) > MAX_BODY_BYTES:
                raise BrokenResponseError("endless body")
            self._body = body
            return
        if b"\r" in body:
            # A lone \r at the end may be half of a \r\n.
            body, rest = (body[:-1], b"\r") if body.endswith(b"\r") else (body, b"")
            body = body.replace(b"\r\n", b"\n") + rest
        if body.endswith(b"\n\n") and body.find(b"\n\n") == len(body) - 2:  # one whole event: the usual case
            self._take_event(body, now_s)
            return
        *events, self._body = body.split(b"\n\n")
        if len(self._body) > MAX_BODY_BYTES:
            raise BrokenResponseError("endless event")
        for event in events:
            self._take_event(event, now_s)

    def _end_body(self, now_s: float) -> None:
        if self.seen.is_stream:
            if self._body.strip():
                raise BrokenResponseError("cut off inside an event")
        elif self.seen.status == 200:
            self._read(self._body, now_s)
            self.seen.is_done = True
        else:
            self.seen.refusal = _refusal(self._body)
        self.seen.conclude(now_s)

    def _take_event(self, event: bytes, now_s: float) -> None:
        if event.startswith(b"data: ") and event.find(b"\n", 0, -2) < 0:
            data = event[6:].rstrip(b"\n")
        else:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            data = b"\n".join(lines)
            if not data:
                return  # a comment, or the name of an event
        if data.strip() == b"[DONE]":
            self.seen.is_done = True
        else:
            self._read(data, now_s)

    def _read(self, data: bytes, now_s: float) -> None:
        seen = self.seen
        try:
            event = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            seen.failure = seen.failure or "malformed event"
            return
        if event.error:
            seen.failure = seen.failure or f"error event: {_error_name(event.error)}"
            seen.refusal = seen.refusal or _message(event.error)
        if event.usage is not None:
            self._read_usage(event.usage)
        if not event.choices:
            return
        seen.num_choice_events += 1
        if math.isnan(seen.first_event_s):
            seen.first_event_s = now_s
        seen.last_event_s = now_s
        choice = event.choices[0]
        if choice.finish_reason:
            seen.finish_reason = choice.finish_reason
        part = choice.delta or choice.message
        text = choice.text or (part and (part.content or part.reasoning_content or part.reasoning)) or ""
        if text or choice.token_ids or (part is not None and part.tool_calls):
            seen.chunk_s.append(now_s)
            seen.chunk_tokens.append(len(choice.token_ids) if choice.token_ids else self._num_untold)
            self._num_untold = 0
            if self._keeps_answer:
                seen.text += text
                seen.token_ids += choice.token_ids or ()

    def _read_usage(self, usage: _Usage) -> None:
        """Takes the counts; tokens that are new since the last one belong to the next event with output."""
        seen = self.seen
        seen.prompt_tokens = usage.prompt_tokens
        total = usage.completion_tokens
        seen.output_tokens = total if total is not None else -1
        if usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens is not None:
            seen.cached_tokens = usage.prompt_tokens_details.cached_tokens
        self._num_untold += max(0, seen.output_tokens - self._seen)
        self._seen = max(0, seen.output_tokens)


def _refusal(body: bytes) -> str:
    """The message in the body of an error, in the forms that servers use; else the body's beginning."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _line(body.decode(errors="replace"))
    if isinstance(found, dict):
        found = next((found[name] for name in ("error", "detail", "message") if found.get(name)), found)
    return _message(found)


def _message(error: Any) -> str:
    return _line(str((error.get("message") if isinstance(error, dict) else None) or error))


def _line(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * MAX_REFUSAL])
    return textwrap.shorten(printable, MAX_REFUSAL, placeholder=" ...")


def _error_name(error: Any) -> str:
    name = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
    return str(name)[:60] if name else "unnamed"
