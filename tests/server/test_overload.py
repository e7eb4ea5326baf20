"""Refusals by the engine, deadlines, and errors in the middle of a stream."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from penstock.base.errors import ContextOverflowError, QueueFullError
from penstock.messages import ErrorInfo, FinishReason, RequestOutput

from .fakes import RunningServer

BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_full_queue_is_a_429_with_retry_after(server: RunningServer, is_stream: bool, n: int) -> None:
    server.engine.refusal = QueueFullError("The queue is full.", retry_after_s=7.4, remedy="Retry.")
    async with server.client() as http:
        answer = await http.post("/v1/chat/completions", json={**BODY, "stream": is_stream, "n": n})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "7"
    assert answer.json()["error"]["code"] == "queue_full"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    await server.settled()
    assert [(record.outcome, record.error_code) for record in server.records] == [("refused", "queue_full")]


async def test_the_openai_client_sees_a_rate_limit(server: RunningServer) -> None:
    server.engine.refusal = QueueFullError("The queue is full.", retry_after_s=1)
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(**BODY)


async def test_a_refusal_of_the_scheduler_keeps_its_status_and_field(server: RunningServer) -> None:
    server.engine.refusal = ContextOverflowError("It can never fit.", param="max_tokens")
    async with server.client() as http:
        answer = await http.post("/v1/chat/completions", json={**BODY, "stream": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_tokens"


async def test_an_error_inside_a_stream_is_an_event_and_no_done(server: RunningServer) -> None:
    async with (
        server.client() as http,
        http.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as answer,
    ):
        lines = answer.aiter_lines()
        first = await anext(lines)
        assert first.startswith("data: ")
        server.engine.hold.clear()
        request = server.engine.submitted[0]
        error = ErrorInfo("internal_error", 500, "The request failed inside the server (RuntimeError).")
        server.engine._tasks.pop(request.request_id).cancel()
        server.engine._streams[request.request_id].push(
            RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=error)
        )
        rest = [line async for line in lines if line]
    assert '"error":{"message":"The request failed inside' in rest[-1]
    assert not any("[DONE]" in line or '"finish_reason":"' in line for line in rest)
    await server.settled()
    assert [(record.outcome, record.status) for record in server.records] == [("error", 500)]


async def test_the_openai_client_raises_on_an_error_inside_a_stream(server: RunningServer) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = await client.chat.completions.create(**BODY, stream=True)
    await anext(stream)
    server.engine.hold.clear()
    for request in server.engine.submitted:
        server.engine.abort([request.request_id], FinishReason.TIMEOUT)
    with pytest.raises(openai.APIError, match="time was over"):
        async for _ in stream:
            pass


async def test_a_deadline_is_a_504(server: RunningServer) -> None:
    server.engine.hold.clear()
    async with server.client() as http:
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=BODY, headers={"x-request-timeout": "0.5"}))
        await server.until(lambda: server.engine.num_open == 1)
        request = server.engine.submitted[0]
        assert request.deadline_s is not None
        assert request.deadline_s - request.arrival_s == pytest.approx(0.5)
        server.engine.abort([request.request_id], FinishReason.TIMEOUT)
        answer = await asking
    assert answer.status_code == 504
    await server.settled()
    assert server.records[0].error_code == "deadline_exceeded"


async def test_a_bug_in_the_server_is_a_500_that_tells_nothing(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: object) -> Any:
        raise RuntimeError("secret prompt text")

    monkeypatch.setattr(server.text, "prepare", broken)
    async with server.client() as http:
        answer = await http.post("/v1/chat/completions", json=BODY)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert server.records[0].outcome == "error"


async def test_a_failure_of_one_choice_ends_the_others(server: RunningServer) -> None:
    server.engine.hold.clear()
    async with server.client() as http:
        asking = asyncio.create_task(http.post("/v1/chat/completions", json={**BODY, "n": 3}))
        await server.until(lambda: server.engine.num_open == 3)
        server.engine.abort([server.engine.submitted[1].request_id], FinishReason.TIMEOUT)
        answer = await asking
    assert answer.status_code == 504
    await server.settled()
    assert len(server.engine.aborted) == 3
