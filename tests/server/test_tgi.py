"""TGI's routes through huggingface_hub: whole and streamed answers say the same."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from huggingface_hub import InferenceClient

from .fakes import EOS, REPLY, RunningServer

ANSWER = REPLY + "héllo 🙂"


async def ask(server: RunningServer, **arguments: Any) -> Any:
    client = InferenceClient(model=server.url, token="none")

    def run() -> Any:
        answer = client.text_generation("héllo 🙂", **arguments)
        return list(answer) if arguments.get("stream") else answer

    return await asyncio.to_thread(run)


async def test_a_whole_text(server: RunningServer) -> None:
    assert await ask(server, max_new_tokens=100) == ANSWER
    assert await ask(server, max_new_tokens=3, return_full_text=True) == "héllo 🙂" + ANSWER[:3]
    sampling = server.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.max_tokens) == (0.0, 100)
    await ask(server, temperature=0.5, top_k=3, top_p=0.5, seed=7, do_sample=True, repetition_penalty=1.5)
    sampling = server.engine.submitted[2].sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.max_tokens) == (0.5, 3, 7, 100)


async def test_a_streamed_text_equals_the_whole_one(server: RunningServer) -> None:
    whole = await ask(server, details=True)
    assert whole.generated_text == ANSWER
    assert [token.text for token in whole.details.tokens] == list(ANSWER)
    assert (whole.details.finish_reason, whole.details.generated_tokens) == ("eos_token", len(ANSWER) + 1)
    assert "".join(await ask(server, stream=True)) == ANSWER
    events = await ask(server, stream=True, details=True)
    assert "".join(event.token.text for event in events) == ANSWER
    assert events[-1].generated_text == ANSWER
    assert events[-1].token.id == EOS
    assert events[-1].details.finish_reason == "eos_token"
    assert [event.token.logprob for event in events[:-1]] == [token.logprob for token in whole.details.tokens]


async def test_stop_strings_stay_in_the_text(server: RunningServer) -> None:
    whole = await ask(server, stop=["said"], details=True)
    assert whole.details.finish_reason == "stop_sequence"
    events = await ask(server, stop=["said"], stream=True, details=True)
    assert events[-1].generated_text == whole.generated_text


async def test_chat_completion(server: RunningServer) -> None:
    client = InferenceClient(base_url=f"{server.url}/v1", token="none")
    messages = [{"role": "user", "content": "hi"}]
    whole = await asyncio.to_thread(lambda: client.chat_completion(messages, model="demo"))
    assert whole.choices[0].message.content == REPLY + "hi"


async def test_describing_routes(server: RunningServer) -> None:
    async with server.client() as http:
        info = (await http.get("/info")).json()
        assert (info["model_id"], info["max_total_tokens"]) == ("demo", 4096)
        assert (await http.get("/health")).status_code == 200
        tokens = (await http.post("/tokenize", json={"inputs": "hé🙂"})).json()
        assert tokens == [
            {"id": ord(text), "text": text, "start": at, "stop": at + 1} for at, text in enumerate("hé🙂")
        ]
        whole = await http.post("/generate", json={"inputs": "hi"})
        assert whole.json() == {"generated_text": REPLY + "hi"}
        streamed = await http.post("/generate_stream", json={"inputs": "hi", "parameters": {"top_n_tokens": 2}})
        assert '"top_tokens":[{"id":' in streamed.text


@pytest.mark.parametrize(
    ("parameters", "named"),
    [({"truncate": 3}, "parameters.truncate"), ({"max_new_tokens": 0}, "parameters.max_new_tokens"),
     ({"watermark": True}, "parameters.watermark"), ({"unheard": 1}, "parameters.unheard")],
)  # fmt: skip
async def test_refusals_name_the_field(server: RunningServer, parameters: Any, named: str) -> None:
    async with server.client() as http:
        answer = await http.post("/generate", json={"inputs": "hi", "parameters": parameters})
    assert answer.status_code == 400
    assert named in answer.json()["error"]
    assert answer.json()["error_type"] == "validation"
