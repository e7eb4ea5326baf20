"""Token ids in and out, and the routes that only tokenize."""

from __future__ import annotations

import json

from .fakes import EOS, REPLY, RunningServer


async def test_token_ids_in_and_out(server: RunningServer) -> None:
    ids = list(map(ord, "hi"))
    body = {"model": "demo", "token_ids": ids, "logprobs": 1, "max_tokens": 100, "stop_token_ids": [EOS]}
    async with server.client() as http:
        whole = (await http.post("/v1/generate", json=body)).json()
        streamed = (await http.post("/v1/generate", json={**body, "stream": True})).text.split("\n\n")
        from_text = (await http.post("/v1/generate", json={"model": "demo", "prompt": "hi"})).json()
    choice = whole["choices"][0]
    assert (choice["token_ids"], choice["text"]) == (list(map(ord, REPLY + "hi")), REPLY + "hi")
    assert (choice["finish_reason"], len(choice["logprobs"])) == ("stop", len(REPLY + "hi"))
    assert from_text["choices"][0]["token_ids"] == choice["token_ids"]
    assert streamed[-2:] == ["data: [DONE]", ""]
    *events, last = [json.loads(event.removeprefix("data: ")) for event in streamed[:-2]]
    assert [token for event in events for token in event["token_ids"]] == choice["token_ids"]
    assert "".join(event["text"] for event in events) == choice["text"]
    assert [entry for event in events for entry in event["logprobs"]] == choice["logprobs"]
    assert last["usage"] == whole["usage"]


async def test_exactly_one_prompt(server: RunningServer) -> None:
    async with server.client() as http:
        for prompt in ({}, {"prompt": "a", "token_ids": [1]}):
            answer = await http.post("/v1/generate", json={"model": "demo", **prompt})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "token_ids")
        answer = await http.post("/tokenize", json={"model": "demo"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


async def test_tokenize_detokenize_and_render(server: RunningServer) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "hé"}]
    ids = list(map(ord, "S\nhé"))
    async with server.client() as http:
        plain = (await http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
        chat = (await http.post("/tokenize", json={"model": "demo", "messages": messages})).json()
        text = (await http.post("/detokenize", json={"model": "demo", "tokens": ids})).json()
        rendered = (await http.post("/v1/render", json={"model": "demo", "messages": messages})).json()
        refused = await http.post("/detokenize", json={"tokens": [-1]})
    assert plain == {"count": 2, "max_model_len": 4096, "tokens": [104, 233], "token_strs": ["h", "é"]}
    assert chat["tokens"] == ids
    assert text == {"prompt": "S\nhé"}
    assert rendered == {"prompt": "S\nhé", "token_ids": ids}
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")
    assert not server.engine.submitted
