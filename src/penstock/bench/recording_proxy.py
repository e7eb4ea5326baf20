"""A proxy that records: requests go on to another server as they are, answers come back byte for byte.

Prompts are hashed here as on our own server. Without the model's tokenizer, four bytes of text stand for a token: then
lengths come from `usage`, and shared prefixes are as long as their texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from penstock.bench.observation import Observation
from penstock.bench.plan import PlannedRequest
from penstock.bench.response_reader import BrokenResponseError, ResponseReader
from penstock.bench.target import Target
from penstock.observability.traffic import TraceRecord, TrafficRecorder, redacted

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_BODY_BYTES: Final = 64 * 1024 * 1024
HEAD_TIMEOUT_S: Final = 60.0
_PIECE: Final = 64 * 1024
_BYTES_PER_TOKEN: Final = 4
_RECORDED: Final = (b"/v1/completions", b"/v1/chat/completions")
_CONTENTS: Final = ("prompt", "messages", "tools", "stop", "user", "metadata", "logit_bias", "suffix", "model")
TokenIds = Callable[[str], list[int]]


def tokens_of_bytes(text: str) -> list[int]:
    """Four bytes a token, for want of the model's own."""
    data = text.encode()
    starts = range(0, len(data), _BYTES_PER_TOKEN)
    return [int.from_bytes(data[start : start + _BYTES_PER_TOKEN], "big") for start in starts]


def prompt_tokens(body: dict[str, Any], token_ids: TokenIds) -> list[int]:
    """The prompt of a request body as tokens; chat messages as their roles and texts, one after another."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and all(isinstance(part, int) for part in prompt):
        return prompt
    if isinstance(prompt, str):
        return token_ids(prompt)
    messages = body.get("messages")
    if not isinstance(messages, list):
        return []
    parts = [f"{part.get('role')}\n{_text(part.get('content'))}\n" for part in messages if isinstance(part, dict)]
    return token_ids("".join(parts))


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


class RecordingProxy:
    """Forwards to one target, a new connection a request, and records what generates text."""

    def __init__(self, target: Target, recorder: TrafficRecorder, token_ids: TokenIds = tokens_of_bytes) -> None:
        self._target = target
        self._recorder = recorder
        self._token_ids = token_ids

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one client's connection: one request, then it is closed."""
        try:
            async with asyncio.timeout(HEAD_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                headers = _headers(head)
                length = int(headers.get(b"content-length", b"0"))
                if length > MAX_BODY_BYTES or b"chunked" in headers.get(b"transfer-encoding", b"").lower():
                    writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    return
                body = await reader.readexactly(length)
            await self._forward(head, headers, body, reader, writer)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            with contextlib.suppress(OSError):
                writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        finally:
            with contextlib.suppress(OSError):
                writer.close()
                await writer.wait_closed()

    async def _forward(
        self, head: bytes, headers: dict[bytes, bytes], body: bytes, reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:  # fmt: skip
        arrival_s = time.monotonic()
        upstream_reader, upstream = await asyncio.open_connection(self._target.host, self._target.port)
        seen = Observation(PlannedRequest([], 0, 0), arrival_s, arrival_s, arrival_s)
        watched = ResponseReader(seen, keeps_answer=True)
        gone = asyncio.create_task(reader.read(1))  # a client that has sent all says nothing more until it leaves
        try:
            upstream.write(_rewritten(head, self._target) + body)
            await _relay(upstream_reader, writer, watched, gone)
            if gone.done() and not seen.is_done:
                seen.is_cancelled = True
        finally:
            gone.cancel()
            upstream.close()
            seen.ended_s = time.monotonic()
            path = head.split(b" ", 2)[1].split(b"?", 1)[0]
            if path.endswith(_RECORDED):
                self._record(path, headers, body, seen)

    def _record(self, path: bytes, headers: dict[bytes, bytes], body: bytes, seen: Observation) -> None:
        try:
            content = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        if not isinstance(content, dict):
            return
        recorder = self._recorder
        prompt = prompt_tokens(content, self._token_ids)
        answer = seen.token_ids or (self._token_ids(seen.text) if seen.text else [])
        took_ms = (seen.ended_s - seen.intended_s) * 1e3
        parameters = {name: value for name, value in content.items() if name not in _CONTENTS}
        record = TraceRecord(
            timestamp=recorder.milliseconds(seen.intended_s),
            input_length=seen.prompt_tokens if seen.prompt_tokens >= 0 else len(prompt),
            output_length=seen.output_tokens if seen.output_tokens >= 0 else len(answer),
            id=secrets.token_hex(8),
            tenant=recorder.hasher.name(headers.get(b"authorization", b"").decode(errors="replace")),
            endpoint=path.rpartition(b"/v1/")[2].decode(),
            parameters=parameters,
            status=seen.status,
            finish_reason=seen.finish_reason,
            cancelled_after_ms=took_ms if seen.is_cancelled else None,
            cached_tokens=seen.cached_tokens if seen.cached_tokens >= 0 else None,
            ttft_ms=(seen.chunk_s[0] - seen.intended_s) * 1e3 if seen.chunk_s else None,
            e2e_ms=took_ms,
            payload=redacted(content) if recorder.has_contents else None,
        )
        recorder.record(record, prompt, answer, seen.ended_s)


async def _relay(
    upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, watched: ResponseReader, gone: asyncio.Task[bytes]
) -> None:
    """Passes the response on until it ends, or the client leaves."""
    while True:
        reading = asyncio.create_task(upstream.read(_PIECE))
        await asyncio.wait((reading, gone), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            reading.cancel()
            return
        data = reading.result()
        now_s = time.monotonic()
        if not data:
            with contextlib.suppress(BrokenResponseError):
                watched.feed_eof(now_s)
            return
        writer.write(data)
        await writer.drain()
        with contextlib.suppress(BrokenResponseError):
            if watched.feed(data, now_s):
                return


def _headers(head: bytes) -> dict[bytes, bytes]:
    lines = head.split(b"\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines) if name}


def _rewritten(head: bytes, target: Target) -> bytes:
    """The head for the other server: its Host, and one request a connection."""
    request_line, *lines = head.rstrip(b"\r\n").split(b"\r\n")
    dropped = (b"host:", b"connection:", b"accept-encoding:")
    kept = [line for line in lines if not line.lower().startswith(dropped)]
    own = [f"Host: {target.host}:{target.port}".encode(), b"Connection: close"]
    return b"\r\n".join([request_line, *own, *kept]) + b"\r\n\r\n"
