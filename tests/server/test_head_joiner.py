"""The head of an answer goes out with what follows it, and alone where nothing does."""

from __future__ import annotations

import asyncio
from typing import Any

from penstock.server.head_joiner import HeadJoiner

from .fakes import RunningServer

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> str:
        return "paused"


def joiner() -> tuple[Any, Any]:
    transport: Any = Transport()
    return HeadJoiner(transport, asyncio.get_running_loop()), transport


async def test_head_and_body_are_one_write() -> None:
    joined, transport = joiner()
    for data in (HEAD, b"a", b"b", HEAD, HEAD + b"c"):
        joined.write(data)
    assert transport.written == [HEAD + b"a", b"b", HEAD + HEAD + b"c"]
    await asyncio.sleep(0)
    assert len(transport.written) == 3
    assert joined.pause_reading() == "paused"


async def test_a_head_alone_goes_out_at_once() -> None:
    joined, transport = joiner()
    joined.write(HEAD)
    await asyncio.sleep(0)
    assert transport.written == [HEAD]
    joined.write(HEAD)
    joined.close()
    assert transport.written == [HEAD, HEAD]
    assert joined.is_closing()


async def test_answers_without_a_body_arrive(server: RunningServer) -> None:
    async with server.client() as http:
        answer = await http.head("/v1/models")
        assert (answer.status_code, answer.content) == (200, b"")
        assert (await http.get("/v1/models")).status_code == 200
