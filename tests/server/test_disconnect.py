"""Clients that leave: the engine is told in every phase, and exactly one record closes each request."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from penstock.server.text import GenerationRequest, Sequenced

from .fakes import RunningServer

BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}


async def connect(server: RunningServer, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends a chat request over a bare socket."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    raw = json.dumps(body).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw
    )
    return reader, writer


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_before_the_first_token(server: RunningServer, is_stream: bool, n: int) -> None:
    server.engine.hold.clear()
    _, writer = await connect(server, {**BODY, "stream": is_stream, "n": n})
    await server.until(lambda: server.engine.num_open == n)
    writer.close()
    await server.until(lambda: len(server.engine.aborted) == n)
    await server.settled()
    assert [(record.outcome, record.status) for record in server.records] == [("cancelled", 499)]


async def test_in_the_middle_of_a_beam_search(server: RunningServer) -> None:
    server.engine.hold.clear()
    _, writer = await connect(server, {**BODY, "use_beam_search": True, "n": 2, "max_tokens": 1000})
    await server.until(lambda: server.engine.num_open == 1)
    writer.close()
    await server.until(lambda: len(server.engine.aborted) == 1)
    await server.settled()
    assert [(record.outcome, record.status) for record in server.records] == [("cancelled", 499)]


@pytest.mark.parametrize("n", [1, 3])
async def test_in_the_middle_of_a_stream(server: RunningServer, n: int) -> None:
    reader, writer = await connect(server, {**BODY, "stream": True, "n": n})
    await reader.readuntil(b"data: ")
    server.engine.hold.clear()
    writer.close()
    await server.until(lambda: len(server.engine.aborted) == n)
    await server.settled()
    assert [record.outcome for record in server.records] == ["cancelled"]
    assert server.records[0].num_output_tokens >= 1


async def test_while_the_prompt_is_prepared(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, release = asyncio.Event(), asyncio.Event()
    prepare = server.text.prepare

    async def slow(request: GenerationRequest) -> list[Sequenced]:
        entered.set()
        await release.wait()
        return await prepare(request)

    monkeypatch.setattr(server.text, "prepare", slow)
    _, writer = await connect(server, BODY)
    await entered.wait()
    writer.close()
    await asyncio.sleep(0.05)
    release.set()
    await server.settled()
    await server.until(lambda: server.records)
    assert [record.outcome for record in server.records] == ["cancelled"]
    assert server.engine.submitted == []


async def test_before_the_body_is_complete(server: RunningServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{")
    await server.until(lambda: server.state.num_open == 1)
    writer.close()
    await server.until(lambda: server.records)
    assert [record.outcome for record in server.records] == ["cancelled"]


async def test_a_connection_serves_one_request_after_another(server: RunningServer) -> None:
    """The watcher of the first request must not eat, or be confused by, the second."""
    async with server.client() as http:
        for is_stream in (False, True, False, True):
            answer = await http.post("/v1/chat/completions", json={**BODY, "stream": is_stream})
            assert answer.status_code == 200
    await server.settled()
    assert [record.outcome for record in server.records] == ["stop"] * 4
    assert server.engine.aborted == []


async def test_a_storm_of_leaving_clients_leaves_nothing_behind(server: RunningServer) -> None:
    async def one(number: int) -> None:
        reader, writer = await connect(server, {**BODY, "stream": number % 2 == 0, "n": 1 + number % 3})
        if number % 4:
            await asyncio.sleep(number % 7 / 1000)
        else:
            await reader.read(100)
        writer.close()

    await asyncio.gather(*(one(number) for number in range(60)))
    await server.until(lambda: len(server.records) == 60)
    await server.settled()
    assert server.engine.num_open == 0
    assert {record.outcome for record in server.records} <= {"cancelled", "stop"}


async def test_a_client_that_does_not_read_is_cut_off(server: RunningServer) -> None:
    _, writer = await connect(server, {**BODY, "stream": True})
    server.engine.hold.clear()
    await server.until(lambda: server.state.num_open == 1)
    opened = next(iter(server.state._open))
    opened.exchange.waiting_since_s = 0.0
    server.state.sweep(server.state.settings.client_timeout + 1, 0.0)
    await server.until(lambda: server.records)
    assert (server.records[0].outcome, server.records[0].error_code) == ("refused", "client_timeout")
    await server.settled()
    assert len(server.engine.aborted) == 1
    writer.close()


async def test_a_request_that_the_engine_forgets_ends_at_its_deadline(server: RunningServer) -> None:
    server.engine.hold.clear()
    async with server.client() as http:
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=BODY))
        await server.until(lambda: server.engine.num_open == 1)
        deadline_s = server.engine.submitted[0].deadline_s
        assert deadline_s is not None
        server.state.sweep(0.0, deadline_s + 1)
        await asyncio.sleep(0.02)
        assert not asking.done(), "the engine has a little longer"
        server.state.sweep(0.0, deadline_s + 10)
        answer = await asking
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert len(server.engine.aborted) == 1
