"""For every protocol and every tool format: the folded stream equals the whole answer, whatever the model wrote and
however it came."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from jiter import from_json
from tests.frontend.parsers.corpus import FORMATS, TOOLS, damaged, make_sample, style_of

from .fakes import RunningServer

ANSWERS_A_FORMAT = 14  # 322 for each protocol
MESSAGES = [{"role": "user", "content": "hi"}]
STYLES = {form.name: style_of(form.template) for form in FORMATS}
Events = list[dict[str, Any]]


def events_of(text: str) -> Events:
    lines = [line.removeprefix("data:").strip() for line in text.splitlines() if line[:1] in ("d", "{")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def fold_chat(events: Events) -> Any:
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    warnings = None
    for event in events:
        (choice,) = event["choices"]
        delta = choice["delta"]
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append(call["function"])
            else:
                message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        warnings = choice.get("warnings", warnings)
    return message, choice["finish_reason"], warnings


def whole_chat(body: Any) -> Any:
    (choice,) = body["choices"]
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls", ())]
    texts = {name: message.get(name) or "" for name in ("content", "reasoning_content")}
    return {**texts, "tool_calls": calls}, choice["finish_reason"], choice.get("warnings")


def fold_messages(events: Events) -> Any:
    blocks: list[Any] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append({**event["content_block"], "json": ""})
            assert event["index"] == len(blocks) - 1
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            for name in ("text", "thinking"):
                if name in delta:
                    block[name] += delta[name]
            block["json"] += delta.get("partial_json", "")
        elif event["type"] == "message_delta":
            end = event
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = from_json(block["json"].encode(), partial_mode=True)  # as anthropic's client does
        del block["json"]
        block.pop("id", None)
    return blocks, end["delta"]["stop_reason"], end["usage"], end.get("warnings")


def whole_messages(body: Any) -> Any:
    blocks = [{name: value for name, value in block.items() if name != "id"} for block in body["content"]]
    return blocks, body["stop_reason"], body["usage"], body.get("warnings")


def fold_ollama(events: Events) -> Any:
    message: dict[str, Any] = {"content": "", "thinking": "", "tool_calls": []}
    for event in events:
        message["content"] += event["message"]["content"]
        message["thinking"] += event["message"].get("thinking", "")
        message["tool_calls"] += event["message"].get("tool_calls", [])
    return message, event["done_reason"], event["eval_count"], event.get("warnings")


def whole_ollama(body: Any) -> Any:
    return fold_ollama([body])


def fold_responses(events: Events) -> Any:
    items: list[Any] = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            items.append(event["item"])
        elif kind == "response.content_part.added":
            items[event["output_index"]]["content"].append(event["part"])
        elif kind.endswith("_text.delta"):
            items[event["output_index"]]["content"][event["content_index"]]["text"] += event["delta"]
        elif kind == "response.function_call_arguments.delta":
            items[event["output_index"]]["arguments"] += event["delta"]
        elif kind == "response.output_item.done":
            item = items[event["output_index"]]
            assert {**item, **({"status": event["item"]["status"]} if "status" in item else {})} == event["item"]
    response = events[-1]["response"]
    assert [item["type"] for item in items] == [item["type"] for item in response["output"]]
    return whole_responses(response)


def whole_responses(body: Any) -> Any:
    items = [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in body["output"]]
    return items, body["status"], body["usage"], body.get("warnings")


PROTOCOLS: dict[str, tuple[dict[str, Any], Callable[[Events], Any], Callable[[Any], Any]]] = {
    "/v1/chat/completions": ({"model": "demo", "messages": MESSAGES, "tools": TOOLS}, fold_chat, whole_chat),
    "/v1/messages": (
        {
            "model": "demo",
            "max_tokens": 4000,
            "messages": MESSAGES,
            "tools": [
                {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS
            ],
        },
        fold_messages,
        whole_messages,
    ),
    "/api/chat": ({"model": "demo", "messages": MESSAGES, "tools": TOOLS}, fold_ollama, whole_ollama),
    "/v1/responses": (
        {
            "model": "demo",
            "input": "hi",
            "store": False,
            "tools": [{"type": "function", **tool["function"]} for tool in TOOLS],
        },
        fold_responses,
        whole_responses,
    ),
}


@pytest.mark.parametrize("path", PROTOCOLS)
async def test_the_folded_stream_equals_the_whole_answer(server: RunningServer, path: str) -> None:
    body, fold, whole = PROTOCOLS[path]
    rng = random.Random(path)
    async with server.client() as http:
        for number in range(ANSWERS_A_FORMAT * len(FORMATS)):
            form = FORMATS[number % len(FORMATS)]
            server.text.style = STYLES[form.name]
            written = make_sample(form, rng).written
            server.engine.script = damaged(written, rng) if rng.random() < 0.5 else written
            server.engine.num_tokens_of_step = lambda: 10_000
            answer = await http.post(path, json={**body, "stream": False})
            longest = rng.choice((1, 7, 40))
            server.engine.num_tokens_of_step = lambda longest=longest: rng.randint(1, longest)
            streamed = await http.post(path, json={**body, "stream": True})
            assert (answer.status_code, streamed.status_code) == (200, 200)
            assert fold(events_of(streamed.text)) == whole(answer.json()), server.engine.script
