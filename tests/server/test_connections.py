"""What a connection may cost before a request is there, and who may ask without a key."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.config.settings import Settings
from penstock.messages.bounds import MAX_HEAD_BYTES

from .fakes import RunningServer, start_server

TEXT: dict[str, Any] = {"model": "demo", "prompt": "hi", "max_tokens": 4}


async def exchange(server: RunningServer, *pieces: bytes) -> bytes:
    """Everything that the server answers until it closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        async with asyncio.timeout(10):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_an_endless_header_is_cut_off(server: RunningServer) -> None:
    head = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nx-long: "
    pieces = [b"a" * 16384 for _ in range(MAX_HEAD_BYTES * 4 // 16384)]
    answer = await exchange(server, head, *pieces)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")


async def test_many_headers_are_cut_off(server: RunningServer) -> None:
    head = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n"
    answer = await exchange(server, head, *(b"x-%d: y\r\n" % number * 100 for number in range(200)))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")


async def test_a_large_body_in_one_piece_is_no_large_head(server: RunningServer) -> None:
    body = b'{"model": "demo", "prompt": "' + b"x" * 200_000 + b'"}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += b"content-length: %d\r\n\r\n" % len(body)
    assert b"context_length_exceeded" in await exchange(server, head + body)


async def test_a_head_that_does_not_come_is_not_waited_for() -> None:
    async with start_server(Settings(port=0, client_timeout=1.0)) as server:
        assert await exchange(server) == b""
        assert await exchange(server, b"GET /health/live HT") == b""
        whole = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
        answer = await exchange(server, whole, b"GET /health/l")
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost"}, 200),
        ({"host": "LOCALHOST:99"}, 200),
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "10.1.2.3:8000"}, 200),
        ({"host": "localhost", "origin": "http://localhost:3000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1.nip.io:8000"}, 403),
        ({"host": "localhost@evil.example"}, 403),
        ({"host": "["}, 403),
        ({"host": "localhost", "origin": "https://evil.example"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost", "origin": "https://evil.example#localhost"}, 403),
    ],
)
async def test_web_pages_cannot_ask_a_server_without_a_key(
    server: RunningServer, headers: dict[str, str], status: int
) -> None:
    async with server.client() as http:
        for path in ("/v1/models", "/metrics"):
            assert (await http.get(path, headers=headers)).status_code == status
        answer = await http.post("/v1/completions", json=TEXT, headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "foreign_host"
        assert server.engine.submitted == []


async def test_with_a_key_any_name_will_do() -> None:
    async with start_server(Settings(port=0, api_key=("k",))) as server, server.client() as http:
        headers = {"host": "llm.example.org", "origin": "https://app.example.org", "authorization": "Bearer k"}
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
