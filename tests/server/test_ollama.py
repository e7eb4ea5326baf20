"""Ollama's routes through the official client: whole and streamed answers say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ollama
import pytest

from penstock.frontend.fill_in_middle import Gap
from penstock.server.model_facts import ModelFacts

from .fakes import REPLY, RunningServer

MESSAGES: Any = [{"role": "user", "content": "héllo 🙂"}]
ANSWER = REPLY + "héllo 🙂"
TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
SCRIPT = '<think>\nHm.\n</think>\n\nLet me.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture
def client(server: RunningServer) -> ollama.AsyncClient:
    return ollama.AsyncClient(host=server.url)


async def test_a_whole_chat(client: ollama.AsyncClient, server: RunningServer) -> None:
    answer = await client.chat(
        model="demo:latest", messages=MESSAGES, keep_alive="5m", think=True,
        options={"temperature": 0.5, "num_predict": -1, "stop": ["xyz"], "repeat_penalty": 1.1, "num_ctx": 2048},
    )  # fmt: skip
    assert (answer.message.role, answer.message.content) == ("assistant", ANSWER)
    assert (answer.done, answer.done_reason, answer.model) == (True, "stop", "demo:latest")
    assert (answer.prompt_eval_count, answer.eval_count) == (len("héllo 🙂"), len(ANSWER) + 1)
    assert answer.total_duration is not None
    assert answer.total_duration > 0
    sampling = server.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.stop) == (0.5, 40, 0.9, ("xyz",))
    assert sampling.repetition_penalty == 1.1
    chat = server.text.requests[0].prompts[0]
    assert not isinstance(chat, (str, list))
    assert chat.variables == {"enable_thinking": True}


async def test_a_streamed_chat_equals_the_whole_one(client: ollama.AsyncClient, server: RunningServer) -> None:
    server.engine.script = SCRIPT
    whole = await client.chat(model="demo", messages=MESSAGES, tools=TOOLS)
    assert whole.message.thinking == "Hm."
    assert whole.message.content == "Let me."
    assert whole.message.tool_calls is not None
    assert whole.message.tool_calls[0].function.arguments == {"a": 1}
    content, thinking, calls, last = "", "", [], None
    async for line in await client.chat(model="demo", messages=MESSAGES, tools=TOOLS, stream=True):
        content += line.message.content or ""
        thinking += line.message.thinking or ""
        calls += line.message.tool_calls or []
        last = line
    assert (content, thinking, calls) == (whole.message.content, whole.message.thinking, whole.message.tool_calls)
    assert last is not None
    assert (last.done, last.done_reason, last.eval_count) == (True, "stop", whole.eval_count)


async def test_tool_results_reach_the_template(client: ollama.AsyncClient, server: RunningServer) -> None:
    messages: Any = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "tool_name": "add", "content": "2"},
    ]
    await client.chat(model="demo", messages=messages, tools=TOOLS)
    chat = server.text.requests[0].prompts[0]
    assert not isinstance(chat, (str, list))
    assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert chat.messages[2] == {"role": "tool", "content": "2", "name": "add"}


async def test_generate(client: ollama.AsyncClient, server: RunningServer) -> None:
    whole = await client.generate(model="demo", prompt="hi", system="Be brief.")
    assert whole.response == REPLY + "hi"
    assert whole.prompt_eval_count == len("Be brief.\nhi")
    lines = [line async for line in await client.generate(model="demo", prompt="hi", raw=True, stream=True)]
    assert "".join(line.response for line in lines) == REPLY + "hi"
    assert lines[-1].done
    assert server.text.requests[1].prompts == ["hi"]


async def test_generate_fills_a_gap(client: ollama.AsyncClient, server: RunningServer) -> None:
    await client.generate(model="demo", prompt="a", suffix="z")
    assert server.text.requests[0].prompts == [Gap("a", "z")]
    with pytest.raises(ollama.ResponseError, match="system has no effect with suffix"):
        await client.generate(model="demo", prompt="a", suffix="z", system="Be brief.")


async def test_loading_without_a_prompt(client: ollama.AsyncClient, server: RunningServer) -> None:
    assert (await client.generate(model="demo")).done_reason == "load"
    assert (await client.chat(model="demo", messages=[])).done_reason == "load"
    assert server.engine.submitted == []


async def test_what_is_served(client: ollama.AsyncClient, server: RunningServer) -> None:
    assert [model.model for model in (await client.list()).models] == ["demo", "alias"]
    assert [model.model for model in (await client.ps()).models] == ["demo", "alias"]
    shown = await client.show("demo")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    async with server.client() as http:
        assert (await http.get("/api/version")).json()["version"].count(".") == 2


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("format", "xml", "format"),
        ("options", {"num_gpu": 3}, "options.num_gpu"),
        ("options", {"num_predict": 0}, "options.num_predict"),
        ("options", {"num_ctx": 10**6}, "options.num_ctx"),
        ("options", {"unheard": 3}, "options.unheard"),
        ("tools", [{"type": "function"}], "tools[0].function.name"),
    ],
)
async def test_refusals_name_the_field(server: RunningServer, field: str, value: Any, named: str) -> None:
    async with server.client() as http:
        answer = await http.post("/api/chat", json={"model": "demo", "messages": MESSAGES, field: value})
    assert answer.status_code == 400
    assert named in answer.json()["error"]


async def test_errors_are_the_clients_own(client: ollama.AsyncClient) -> None:
    with pytest.raises(ollama.ResponseError, match="no model"):
        await client.chat(model="other", messages=MESSAGES)


def test_the_facts_of_a_checkpoint_are_read_off_its_files(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {}, "a": {"shape": [2, 3]}, "b": {"shape": [4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    facts = ModelFacts.read(tmp_path, "llama")
    assert (facts.num_parameters, facts.size_bytes, facts.family) == (10, 8 + len(header) + 20, "llama")
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    facts = ModelFacts.read(tmp_path / "one.gguf", "llama")
    assert (facts.file_format, facts.size_bytes) == ("gguf", 4)
