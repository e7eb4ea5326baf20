"""Files and batches through the official client, and what a restart leaves of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import openai
import pytest

from penstock.base.errors import ValidationError
from penstock.config.settings import Settings
from penstock.messages.bounds import BACKGROUND_PRIORITY
from penstock.server.multipart import parse_form
from penstock.server.openai.batches import parse_lines

from .fakes import REPLY, RunningServer, fake_vector, start_server

PATH = "/v1/chat/completions"
FORM = b"multipart/form-data; boundary=x"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(port=0, data_directory=str(tmp_path / "data"))


def client_of(server: RunningServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=10)


def line(number: int, **more: Any) -> dict[str, Any]:
    body = {"model": "demo", "messages": [{"role": "user", "content": f"n{number}"}], **more}
    return {"custom_id": f"c{number}", "method": "POST", "url": PATH, "body": body}


def file_of(lines: list[dict[str, Any]]) -> tuple[str, bytes]:
    return "jobs.jsonl", "\n".join(map(json.dumps, lines)).encode()


async def begin(client: openai.AsyncOpenAI, lines: list[dict[str, Any]]) -> str:
    uploaded = await client.files.create(file=file_of(lines), purpose="batch")
    batch = await client.batches.create(
        input_file_id=uploaded.id, endpoint=PATH, completion_window="24h", metadata={"a": "b"}
    )
    assert batch.status == "validating"
    return batch.id


async def until(client: openai.AsyncOpenAI, server: RunningServer, batch_id: str, *statuses: str) -> Any:
    for _ in range(500):
        batch = await client.batches.retrieve(batch_id)
        if batch.status in statuses:
            return batch
        await server.settled()
    raise AssertionError(batch.status)


async def results(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    content = await client.files.content(file_id)
    return [json.loads(one) for one in content.text.splitlines()]


async def test_files(server: RunningServer) -> None:
    client = client_of(server)
    data = bytes(range(256)) + b"\r\n--x\r\n"
    uploaded = await client.files.create(file=("größe.bin", data), purpose="user_data")
    assert (uploaded.filename, uploaded.bytes, uploaded.purpose) == ("größe.bin", len(data), "user_data")
    assert (await client.files.content(uploaded.id)).content == data
    assert [file.id for file in (await client.files.list()).data] == [uploaded.id]
    assert (await client.files.retrieve(uploaded.id)).filename == "größe.bin"
    second = await client.files.create(file=("b", b"x"), purpose="batch")
    assert [file.id async for file in client.files.list(limit=1)] == [second.id, uploaded.id]
    assert [file.id for file in (await client.files.list(purpose="batch")).data] == [second.id]
    with pytest.raises(openai.BadRequestError, match="limit"):
        await client.files.list(limit=0)
    with pytest.raises(openai.BadRequestError, match="order"):
        await client.files.list(order="asc")
    await client.files.delete(uploaded.id)
    with pytest.raises(openai.NotFoundError):
        await client.files.content(uploaded.id)
    with pytest.raises(openai.BadRequestError, match="purpose"):
        await client.files.create(file=("a", b"x"), purpose="vision")


async def test_a_batch_of_embeddings(server: RunningServer) -> None:
    client = client_of(server)
    url = "/v1/embeddings"
    lines = [
        {"custom_id": f"c{number}", "method": "POST", "url": url, "body": {"model": "demo", "input": f"n{number}"}}
        for number in range(5)
    ]
    uploaded = await client.files.create(file=file_of(lines), purpose="batch")
    begun = await client.batches.create(input_file_id=uploaded.id, endpoint=url, completion_window="24h")
    batch = await until(client, server, begun.id, "completed")
    vectors = [
        answer["response"]["body"]["data"][0]["embedding"] for answer in await results(client, batch.output_file_id)
    ]
    assert vectors == [pytest.approx(fake_vector(list(map(ord, f"n{number}")))) for number in range(5)]
    assert {request.priority for request in server.engine.submitted} == {BACKGROUND_PRIORITY}


async def test_a_batch_answers_every_line_once(server: RunningServer) -> None:
    client = client_of(server)
    lines = [line(number) for number in range(40)] + [line(40, temperature=9)]
    batch = await until(client, server, await begin(client, lines), "completed")
    assert batch.request_counts.to_dict() == {"total": 41, "completed": 40, "failed": 1}
    answers = await results(client, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"c{number}" for number in range(40)]
    texts = [answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers]
    assert texts == [f"{REPLY}n{number}" for number in range(40)]
    (failed,) = await results(client, batch.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("c40", 400)
    assert {request.priority for request in server.engine.submitted} == {BACKGROUND_PRIORITY}
    assert [one.id for one in (await client.batches.list()).data] == [batch.id]


async def test_a_batch_takes_its_share_beside_others_too(server: RunningServer) -> None:
    client = client_of(server)
    server.engine.hold.clear()
    asked = asyncio.create_task(
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "hi"}])
    )
    await server.until(lambda: server.engine.num_open == 1)
    batch_id = await begin(client, [line(number) for number in range(40)])
    most = server.engine.ready.max_num_seqs // 4
    await server.until(lambda: server.engine.num_open == 1 + most)
    await asyncio.sleep(0.1)
    assert server.engine.num_open == 1 + most
    server.engine.hold.set()
    assert (await asked).choices[0].message.content == REPLY + "hi"
    await until(client, server, batch_id, "completed")


async def test_a_cancelled_batch_keeps_what_is_done(server: RunningServer) -> None:
    client = client_of(server)
    done = await until(client, server, await begin(client, [line(0)]), "completed")
    server.engine.hold.clear()
    batch_id = await begin(client, [line(number) for number in range(10)])
    await server.until(lambda: server.engine.num_open)
    assert (await client.batches.cancel(batch_id)).status == "cancelling"
    batch = await until(client, server, batch_id, "cancelled")
    server.engine.hold.set()
    assert batch.request_counts is not None
    assert batch.request_counts.total == 10
    assert (await client.batches.cancel(done.id)).status == "completed"


async def test_a_batch_goes_on_after_a_restart(settings: Settings) -> None:
    async with start_server(settings) as server:
        client = client_of(server)
        server.engine.hold.clear()
        batch_id = await begin(client, [line(number) for number in range(10)])
        await server.until(lambda: server.engine.num_open)
        finished = (batch_id, 3, False, b'{"custom_id":"c3"}')
        with contextlib.closing(sqlite3.connect(settings.data_path / "batches.sqlite3")) as store, store:
            store.execute("INSERT INTO results VALUES (?, ?, ?, ?)", finished)
        async with start_server(settings) as second:
            with pytest.raises(openai.InternalServerError, match="data-directory"):
                await client_of(second).batches.list()
        server.state.drain()
    async with start_server(settings) as server:
        client = client_of(server)
        batch = await until(client, server, batch_id, "completed")
        answers = await results(client, batch.output_file_id)
        assert [answer["custom_id"] for answer in answers] == [f"c{number}" for number in range(10)]
        assert len(server.engine.submitted) <= 9, "what had a result was not asked again"


async def test_an_expired_batch_gives_what_is_done(server: RunningServer, settings: Settings) -> None:
    client = client_of(server)
    server.state.now_s = lambda: 1000.0  # type: ignore[method-assign]
    server.engine.hold.clear()
    batch_id = await begin(client, [line(number) for number in range(3)])
    await server.until(lambda: server.engine.num_open)
    server.state.now_s = lambda: 1000.0 + 2 * 86_400  # type: ignore[method-assign]
    server.engine.hold.set()
    batch = await until(client, server, batch_id, "expired")
    assert batch.output_file_id is not None


def test_what_is_wrong_with_a_file_is_said_line_by_line() -> None:
    good = json.dumps(line(1)).encode()
    wrong = [
        b"nothing",
        good,
        json.dumps({**line(2), "url": "/other"}).encode(),
        json.dumps(line(3, stream=True)).encode(),
    ]
    lines, errors = parse_lines(b"\n".join([good, b"", *wrong]), PATH)
    assert len(lines) == 1
    assert [(error["line"], error["code"]) for error in errors] == [
        (3, "invalid_json_line"), (4, "duplicate_custom_id"), (5, "mismatched_endpoint"), (6, "invalid_request"),
    ]  # fmt: skip
    assert parse_lines(b"\n\n", PATH)[1][0]["code"] == "empty_file"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(b"", b"application/json"), (b"--x", FORM), (b"", b"multipart/form-data"),
     (b"--x\r\n\r\nno name\r\n--x--", FORM), (b"--x\r\n" * 99, FORM)],
)  # fmt: skip
def test_malformed_forms_are_refused(body: bytes, content_type: bytes) -> None:
    with pytest.raises(ValidationError):
        parse_form(body, content_type)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("endpoint", "/v1/other", "endpoint"),
        ("completion_window", "1h", "completion_window"),
        ("unheard", 1, "unheard"),
    ],
)
async def test_refusals_name_the_field(server: RunningServer, field: str, value: Any, named: str) -> None:
    body = {"input_file_id": "f", "endpoint": PATH, "completion_window": "24h", field: value}
    async with server.client() as http:
        answer = await http.post("/v1/batches", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)
        assert (await http.post("/v1/batches", json={**body, "unheard": 1})).status_code == 400
        assert (await http.get("/v1/batches/none")).status_code == 404
