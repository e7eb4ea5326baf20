"""`serve --record`: one line a request, without its contents unless they were asked for; and token ids for replays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.observability.traffic import TraceHeader, TrafficRecorder

from .fakes import REPLY, RunningServer


def lines(recorder: TrafficRecorder) -> list[dict[str, Any]]:
    recorder.close()
    return [json.loads(line) for line in recorder.path.read_text().splitlines()[1:]]


async def test_a_conversation_is_recorded_without_its_words(server: RunningServer, tmp_path: Path) -> None:
    server.state.recorder = recorder = TrafficRecorder(tmp_path, TraceHeader())
    question = "confidential question number one"
    first = [{"role": "user", "content": question}]
    async with server.client(headers={"authorization": "Bearer key"}) as client:
        answer = await client.post(
            "/v1/chat/completions", json={"model": "demo", "messages": first, "temperature": 0.5}
        )
        said = answer.json()["choices"][0]["message"]["content"]
        # The fake joins messages by newlines, so a prompt that continues prompt and answer is made by hand.
        follow = {"model": "demo", "prompt": f"{question}{said}and now?", "stop": ["private"], "stream": True}
        await client.post("/v1/completions", json=follow)
        refused = await client.post("/v1/completions", json={"model": "demo", "prompt": "x", "temperature": 9})
        assert refused.status_code == 400
    await server.settled()
    first_row, second_row = lines(recorder)
    text = recorder.path.read_text()
    assert "confidential" not in text
    assert "private" not in text
    assert "key" not in text
    assert first_row["input_length"] == len(question)
    assert first_row["output_length"] == len(REPLY + question)
    assert (first_row["finish_reason"], first_row["cached_tokens"]) == ("stop", 2)
    assert first_row["parameters"]["temperature"] == 0.5
    assert len(first_row["hash_ids"]) == len(question) // 16
    assert second_row["parent_id"] == first_row["id"]
    assert second_row["think_ms"] >= 0
    assert first_row["tenant"] == second_row["tenant"] != ""


async def test_contents_by_choice_redacted(server: RunningServer, tmp_path: Path) -> None:
    server.state.recorder = recorder = TrafficRecorder(tmp_path, TraceHeader(has_contents=True))
    async with server.client() as client:
        await client.post("/v1/completions", json={"model": "demo", "prompt": "I am a@b.org"})
    await server.settled()
    [row] = lines(recorder)
    assert row["payload"] == {"model": "demo", "prompt": "I am [redacted]"}


@pytest.mark.parametrize("is_stream", [False, True])
async def test_token_ids_as_vllm_returns_them(server: RunningServer, is_stream: bool) -> None:
    body = {"model": "demo", "prompt": "hi", "return_token_ids": True, "stream": is_stream}
    async with server.client() as client:
        response = await client.post("/v1/completions", json=body)
    if is_stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        found = [token for event in events for token in event["choices"][0]["token_ids"]]
    else:
        found = response.json()["choices"][0]["token_ids"]
    assert "".join(map(chr, found)) == REPLY + "hi"
