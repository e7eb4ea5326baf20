"""A server with exactly known behaviour: what each request gets, and when, follows from a Behaviour.

    python tests/bench/fake_server.py --port 8250 --first-s 0.02 --gap-s 0.001 [--capacity 4]

The protocol runs on real sockets, and on the simulated ones of the tests, where its times are exact.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Behaviour:
    """Of one request. The first chunk comes after first_s, each further one gap_s later; the end end_s after the last.

    tokens_a_chunk: as a speculating server sends. says_tokens: usage with each chunk. cut_after: the connection is
    closed after that many chunks. leaves_out: of "finish_reason", "[DONE]", "usage". status: answered at once.
    pieces: the bytes of each event are sent in that many writes. empty_first_s: a chunk without text that long before.
    token_ids: of the answer, told one a chunk.
    """

    first_s: float = 0.1
    gap_s: float = 0.02
    end_s: float = 0.0
    tokens_a_chunk: int = 1
    says_tokens: bool = False
    cut_after: int | None = None
    leaves_out: tuple[str, ...] = ()
    status: int = 200
    error_event_after: int | None = None
    pieces: int = 1
    empty_first_s: float | None = None
    cached_tokens: int = 0
    closes: bool = False
    usage_factor: float = 1.0
    token_ids: tuple[int, ...] = ()


@dataclass
class FakeServer:
    """behave: of a request body and its number. capacity: requests served at the same time; others wait in order."""

    behave: Callable[[dict[str, Any], int], Behaviour] = lambda _body, _number: Behaviour()
    capacity: int = 1_000_000
    bodies: list[dict[str, Any]] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    keeps_bodies: bool = True
    num_seen: int = 0
    num_active: int = 0
    waiting: deque[Callable[[], None]] = field(default_factory=deque)

    def protocol(self) -> asyncio.Protocol:
        return _Connection(self)

    def admit(self, start: Callable[[], None]) -> None:
        if self.num_active < self.capacity:
            self.num_active += 1
            start()
        else:
            self.waiting.append(start)

    def release(self) -> None:
        if self.waiting:
            self.waiting.popleft()()
        else:
            self.num_active -= 1


class _Connection(asyncio.Protocol):
    def __init__(self, server: FakeServer) -> None:
        self._server = server
        self._buffer = b""
        self._loop = asyncio.get_running_loop()
        self._is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._is_lost = True

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end].lower()
        if head.startswith(b"get"):
            self._buffer = b""
            models = json.dumps({"object": "list", "data": [{"id": "fake"}]}).encode()
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(models) + models)
            return
        start = head.index(b"content-length:") + 15
        length = int(head[start:].split(b"\r\n", 1)[0])
        if len(self._buffer) < end + 4 + length:
            return
        body = json.loads(self._buffer[end + 4 : end + 4 + length])
        self._buffer = self._buffer[end + 4 + length :]
        self._begin(body)

    def _begin(self, body: dict[str, Any]) -> None:
        server = self._server
        number, server.num_seen = server.num_seen, server.num_seen + 1
        if server.keeps_bodies:
            server.bodies.append(body)
            server.arrivals_s.append(self._loop.time())
        behaviour = server.behave(body, number)
        server.admit(lambda: _Answer(self, server, body, behaviour))

    def write(self, data: bytes) -> None:
        if not self._is_lost:
            self._transport.write(data)

    def close(self) -> None:
        self._transport.close()


class _Answer:
    """One response, event by event, at times counted from its start."""

    def __init__(self, connection: _Connection, server: FakeServer, body: dict[str, Any], behaviour: Behaviour) -> None:
        self._connection, self._server, self._how = connection, server, behaviour
        self._loop = asyncio.get_running_loop()
        self._start_s = self._loop.time()
        self._is_chat = "messages" in body
        self._left = int(body.get("max_tokens", 1))
        self._num_tokens = self._left
        self._num_chunks = 0
        self._num_prompt = len(body["prompt"]) if "prompt" in body else 10
        if behaviour.status != 200:
            body = b'{"error": {"message": "as asked"}}'
            head = b"HTTP/1.1 %d Sorry\r\nContent-Length: %d\r\n\r\n" % (behaviour.status, len(body))
            self._connection.write(head + body)
            self._server.release()
            return
        if not body.get("stream"):
            self._at(behaviour.first_s, self._whole)
            return
        if behaviour.empty_first_s is not None:
            self._at(behaviour.first_s - behaviour.empty_first_s, self._empty)
        self._connection.write(SSE_HEAD)
        self._at(behaviour.first_s, self._chunk)

    def _at(self, offset_s: float, call: Callable[[], None]) -> None:
        self._loop.call_at(self._start_s + offset_s, call)

    def _whole(self) -> None:
        answer = {"choices": [self._choice("word " * self._left, "length")], "usage": self._usage(self._num_tokens)}
        text = json.dumps(answer).encode()
        self._connection.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
        self._server.release()

    def _empty(self) -> None:
        self._event({"choices": [self._choice("", None)]})

    def _chunk(self) -> None:
        how = self._how
        count = min(how.tokens_a_chunk, self._left)
        self._left -= count
        self._num_chunks += 1
        is_last = self._left == 0
        reason = "length" if is_last and "finish_reason" not in how.leaves_out else None
        event: dict[str, Any] = {"choices": [self._choice("word " * count, reason)]}
        if how.token_ids:
            event["choices"][0]["token_ids"] = [how.token_ids[self._num_chunks - 1]]
        if how.says_tokens:
            event["usage"] = self._usage(self._num_tokens - self._left)
        self._event(event)
        if self._num_chunks == how.error_event_after:
            self._event({"error": {"message": "it broke", "code": "internal_error"}})
            is_last = True
        if self._num_chunks == how.cut_after:
            self._connection.close()
            self._server.release()
        elif is_last:
            self._at(how.first_s + (self._num_chunks - 1) * how.gap_s + how.end_s, self._end)
        else:
            self._at(how.first_s + self._num_chunks * how.gap_s, self._chunk)

    def _end(self) -> None:
        if "usage" not in self._how.leaves_out:
            self._event({"choices": [], "usage": self._usage(self._num_tokens)})
        if "[DONE]" not in self._how.leaves_out:
            self._write(b"data: [DONE]\n\n")
        self._connection.write(b"0\r\n\r\n")
        if self._how.closes:
            self._connection.close()
        self._server.release()

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        part = {"delta": {"content": text}} if self._is_chat else {"text": text}
        return {"index": 0, **part, "finish_reason": reason}

    def _usage(self, completion_tokens: int) -> dict[str, Any]:
        return {
            "prompt_tokens": int(self._num_prompt * self._how.usage_factor),
            "completion_tokens": completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._how.cached_tokens},
        }

    def _event(self, content: dict[str, Any]) -> None:
        self._write(b"data: " + json.dumps(content).encode() + b"\n\n")

    def _write(self, event: bytes) -> None:
        pieces = self._how.pieces
        if pieces == 1:
            self._connection.write(b"%x\r\n%s\r\n" % (len(event), event))
            return
        # Torn twice: the event over several HTTP chunks, and the bytes of these over several writes.
        half = len(event) // 2
        wire = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (event[:half], event[half:]))
        size = max(1, len(wire) // pieces)
        for place in range(0, len(wire), size):
            self._connection.write(wire[place : place + size])


async def serve(port: int, server: FakeServer) -> None:
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(server.protocol, "127.0.0.1", port, backlog=4096)
    print("ready", listener.sockets[0].getsockname()[1], flush=True)
    await listener.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--first-s", type=float, default=0.02)
    parser.add_argument("--gap-s", type=float, default=0.001)
    parser.add_argument("--capacity", type=int, default=1_000_000)
    parser.add_argument("--status", type=int, default=200)
    options = parser.parse_args()
    behaviour = Behaviour(first_s=options.first_s, gap_s=options.gap_s, status=options.status)
    server = FakeServer(lambda _body, _number: behaviour, options.capacity, keeps_bodies=False)
    import uvloop

    uvloop.run(serve(options.port, server))


if __name__ == "__main__":
    main()
