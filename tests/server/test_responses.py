"""The responses endpoint through the official client: kept, continued, streamed, made in the background."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from penstock.config.settings import Settings
from penstock.server.openai import response_store
from penstock.server.openai.response_store import ResponseStore, StoredResponse, UnknownResponseError

from .fakes import REPLY, RunningServer

TOOLS: Any = [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}]
SCRIPT = '<think>\nHm.\n</think>\n\nLet me.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(port=0, data_directory=str(tmp_path / "data"))


@pytest.fixture
def client(server: RunningServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=10)


async def test_a_response_is_kept_and_continued(client: openai.AsyncOpenAI, server: RunningServer) -> None:
    first = await client.responses.create(model="demo", input="hi", instructions="Be brief.", metadata={"a": "b"})
    assert (first.output_text, first.status, first.metadata) == (REPLY + "hi", "completed", {"a": "b"})
    assert first.usage is not None
    assert first.usage.output_tokens == len(REPLY + "hi") + 1
    assert (await client.responses.retrieve(first.id)).to_dict() == first.to_dict()
    second = await client.responses.create(model="demo", input="and?", previous_response_id=first.id)
    assert second.output_text == REPLY + "and?"
    chat = server.text.requests[1].prompts[0]
    assert not isinstance(chat, (str, list))
    assert chat.messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": REPLY + "hi"},
        {"role": "user", "content": "and?"},
    ]
    listed = await client.responses.input_items.list(second.id)
    assert [item.to_dict()["content"] for item in listed.data] == ["and?"]
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="demo", input="x", previous_response_id=first.id)
    await client.responses.create(model="demo", input="x", previous_response_id=second.id)


async def test_what_is_not_stored_is_not_there(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model="demo", input="hi", store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(response.id)


async def test_a_streamed_response_equals_the_whole_one(client: openai.AsyncOpenAI, server: RunningServer) -> None:
    server.engine.script = SCRIPT
    whole = await client.responses.create(model="demo", input="hi", tools=TOOLS)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    async with client.responses.stream(model="demo", input="hi", tools=TOOLS) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    shown = [_without_ids(response.to_dict()) for response in (final, whole)]
    assert shown[0] == shown[1]
    kept = await client.responses.retrieve(final.id)
    assert _without_ids(kept.to_dict()) == shown[1]


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = ("id", "call_id", "created_at", "parsed", "parsed_arguments")
        return {key: _without_ids(item) for key, item in value.items() if key not in left_out}
    return [_without_ids(item) for item in value] if isinstance(value, list) else value


async def test_tool_results(client: openai.AsyncOpenAI, server: RunningServer) -> None:
    server.engine.script = SCRIPT
    called = await client.responses.create(model="demo", input="hi", tools=TOOLS)
    call = called.output[-1]
    assert call.type == "function_call"
    server.engine.script = None
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
    await client.responses.create(model="demo", input=[result], previous_response_id=called.id, tools=TOOLS)
    await client.responses.create(
        model="demo", input=[{"role": "user", "content": "hi"}, *called.output, result], tools=TOOLS
    )
    chats = [request.prompts[0] for request in server.text.requests[1:]]
    function = {"name": "add", "arguments": '{"a": 1}'}
    for chat in chats:
        assert not isinstance(chat, (str, list))
        assert chat.messages[1:] == [
            {"role": "assistant", "content": "Let me.", "reasoning_content": "Hm.",
             "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": call.call_id, "content": "2"},
        ]  # fmt: skip


async def test_a_cut_response_is_incomplete(client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model="demo", input="hi", max_output_tokens=3)
    assert (response.status, response.output_text) == ("incomplete", REPLY[:3])
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


async def test_background(client: openai.AsyncOpenAI, server: RunningServer) -> None:
    server.engine.hold.clear()
    begun = await client.responses.create(model="demo", input="hi", background=True)
    assert begun.status == "queued"
    await server.until(lambda: server.engine.submitted)
    assert (await client.responses.retrieve(begun.id)).status == "in_progress"
    other = await client.responses.create(model="demo", input="ho", background=True)
    await server.until(lambda: len(server.engine.submitted) == 2)
    assert (await client.responses.cancel(other.id)).status == "cancelled"
    server.engine.hold.set()
    await server.settled()
    done = await client.responses.retrieve(begun.id)
    assert (done.status, done.output_text, done.background) == ("completed", REPLY + "hi", True)
    assert (await client.responses.retrieve(other.id)).status == "cancelled"
    assert (await client.responses.cancel(begun.id)).status == "completed"
    failed = await client.responses.create(model="demo", input="hi", background=True, max_output_tokens=5000)
    await server.settled()
    await asyncio.sleep(0.05)
    ended = await client.responses.retrieve(failed.id)
    assert ended.status == "failed"
    assert ended.error is not None


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [("truncation", "auto", "truncation"), ("input", [{"type": "image"}], "input[0].type"), ("input", [], "input"),
     ("tools", [{"type": "web_search"}], "tools[0].type"), ("max_output_tokens", 0, "max_output_tokens"),
     ("text", {"format": {"type": "json_schema"}}, "text.format.schema"), ("tool_choice", "required", "tool_choice"),
     ("unheard", 1, "unheard"), ("background", True, "background")],
)  # fmt: skip
async def test_refusals_name_the_field(server: RunningServer, field: str, value: Any, named: str) -> None:
    more = {"store": False} if field == "background" else {}
    async with server.client() as http:
        answer = await http.post("/v1/responses", json={"model": "demo", "input": "hi", **more, field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)


def test_the_store_is_bounded_and_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.sqlite3"
    store = ResponseStore(path, 0.0)
    store.put(StoredResponse("old", b"{}", b"[]", b"[1]"), 1.0)
    store.put(StoredResponse("new", b"{}", b"[]", b"[2]"), 1000.0)
    store.put(StoredResponse("open", b'{"status":"queued"}', b"[]", b"[]", is_done=False), 1000.0)
    store.close()
    store = ResponseStore(path, 1000.0)
    assert store.get("new", 1000.0).messages == b"[2]"
    assert b'"failed"' in store.get("open", 1000.0).body, "the server that worked on it is gone"
    with pytest.raises(UnknownResponseError):
        store.get("old", 2.0 + response_store.EXPIRES_AFTER_S)
    monkeypatch.setattr(response_store, "MAX_ROWS", 2)
    store.clean(1000.0)
    assert not store.has("old")
    store.clean(2000.0 + response_store.EXPIRES_AFTER_S)
    assert not store.has("new")
    store.close()
