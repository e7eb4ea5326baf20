"""One HTTP request and its answer on bare ASGI: bounded body, disconnect, one-shot answers, event streams.

No task group and no response object: what is sent for every token should cost little more than the write itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from starlette.types import Receive, Scope, Send

from penstock.base.errors import PenstockError, ValidationError
from penstock.messages.bounds import BOUNDS, MAX_BODY_BYTES, MAX_ENTRIES

JSON: Final = b"application/json"
EVENT_STREAM: Final = b"text/event-stream; charset=utf-8"
JSON_LINES: Final = b"application/x-ndjson"
_STREAM_HEADERS: Final = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
)


class BodyTooLargeError(ValidationError):
    code = "body_too_large"
    status = 413


class ClientGoneError(PenstockError):
    """The client closed the connection; nothing can be sent any more. 499 is nginx's status for it, for the log."""

    code = "client_gone"
    status = 499


class Exchange:
    """Reads one request and writes its answer. Made by the app for the length of one request.

    waiting_since_s: event-loop time since when the client has kept us waiting (for its body, or to read), else None;
    the sweeper cuts it off after `client_timeout`. stream_type: the content type of a streamed answer.
    """

    __slots__ = (
        "_is_finished", "_is_started", "_loop", "_receive", "_send", "_watcher", "headers", "request_id", "scope",
        "status", "stream_type", "waiting_since_s",
    )  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self.scope = scope
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = request_id
        self.status = 0
        self.stream_type = EVENT_STREAM
        self.waiting_since_s: float | None = None
        self._receive = receive
        self._send = send
        self._is_started = False
        self._is_finished = False
        self._watcher: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def is_started(self) -> bool:
        """Whether the status line has been sent, so that an error can no longer change it."""
        return self._is_started

    async def read_body(self) -> bytes:
        """The whole body. Raises BodyTooLargeError, before reading where the length is declared; ClientGoneError."""
        declared = self.headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > MAX_BODY_BYTES:
            raise BodyTooLargeError(f"The body exceeds {MAX_BODY_BYTES} bytes.")
        pieces: list[bytes] = []
        size = 0
        self.waiting_since_s = self._loop.time()
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGoneError("The client left before its request was complete.")
            piece = message.get("body", b"")
            size += len(piece)
            if size > MAX_BODY_BYTES:
                raise BodyTooLargeError(f"The body exceeds {MAX_BODY_BYTES} bytes.")
            pieces.append(piece)
            if not message.get("more_body", False):
                self.waiting_since_s = None
                return b"".join(pieces) if len(pieces) > 1 else piece

    def watch_disconnect(self, on_disconnect: Callable[[], None]) -> None:
        """Calls `on_disconnect` once if the client leaves before the answer is finished. After read_body."""
        self._watcher = self._loop.create_task(self._watch(on_disconnect))

    async def _watch(self, on_disconnect: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._is_finished:
            on_disconnect()

    async def respond(
        self, status: int, body: bytes, content_type: bytes = JSON, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        """Sends the whole answer."""
        assert not self._is_started
        self._is_started = True
        self.status = status
        self.waiting_since_s = self._loop.time()
        await self._send({"type": "http.response.start", "status": status, "headers": [
            (b"content-type", content_type), (b"content-length", b"%d" % len(body)),
            (b"x-request-id", self.request_id.encode("ascii")), *headers,
        ]})  # fmt: skip
        await self._send({"type": "http.response.body", "body": body})
        self._finish()

    async def write(self, events: bytes) -> None:
        """Sends complete events; the first call also sends the headers."""
        self.waiting_since_s = self._loop.time()
        if not self._is_started:
            self._is_started = True
            self.status = 200
            await self._send({"type": "http.response.start", "status": 200, "headers": [
                (b"content-type", self.stream_type), *_STREAM_HEADERS,
                (b"x-request-id", self.request_id.encode("ascii")),
            ]})  # fmt: skip
        await self._send({"type": "http.response.body", "body": events, "more_body": True})
        self.waiting_since_s = None

    async def end(self, events: bytes = b"") -> None:
        """Sends the last events and ends the stream."""
        if not self._is_started:
            await self.write(b"")
        self.waiting_since_s = self._loop.time()
        await self._send({"type": "http.response.body", "body": events})
        self._finish()

    def close(self) -> None:
        """Stops watching the client. The app calls it when the request is over, however it ended."""
        self._is_finished = True
        if self._watcher is not None:
            self._watcher.cancel()

    def _finish(self) -> None:
        self.waiting_since_s = None
        self._is_finished = True

    def timeout_s(self, default_s: float) -> float:
        """The time limit: x-request-timeout, at most (and without it) the server's own. Raises ValidationError."""
        raw = self.headers.get(b"x-request-timeout")
        if raw is None:
            return default_s
        try:
            wished = float(raw)
        except ValueError:
            wished = 0.0
        lowest = BOUNDS["timeout_s"][0]
        if not lowest <= wished <= default_s:
            raise ValidationError(
                f"x-request-timeout must be {lowest:g} to {default_s:g} seconds.", param="x-request-timeout"
            )
        return wished


def choose_request_id(given: bytes | None, generated: str) -> str:
    """The client's x-request-id where it is short and plain, else `generated`."""
    if given is None or not 0 < len(given) <= MAX_ENTRIES["request_id_chars"]:
        return generated
    text = given.decode("latin-1")
    return text if text.isascii() and all(char.isalnum() or char in "-_.:/" for char in text) else generated
