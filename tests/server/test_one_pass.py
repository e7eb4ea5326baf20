"""Embeddings, scores, labels and rankings over HTTP, with the official client where there is one."""

from __future__ import annotations

import base64
import struct
from typing import Any

import httpx
import ollama
import openai
import pytest

from penstock.base.errors import QueueFullError
from penstock.frontend.one_pass import ModelTasks

from .fakes import MAX_MODEL_LEN, RunningServer, fake_vector

CROSS_ENCODER = ModelTasks(("classify", "score", "rerank"), 4, ("relevant",))
CLASSIFIER = ModelTasks(("classify",), 4, ("calm", "wild", "deep"))


@pytest.fixture
def client(server: RunningServer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=10)


async def post(server: RunningServer, path: str, **body: Any) -> httpx.Response:
    async with server.client() as http:
        return await http.post(path, json=body)


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize(
    ("given", "texts"),
    [("ab", ["ab"]), (["ab", "cde"], ["ab", "cde"]), ([97, 98], ["ab"]), ([[97], [98, 99]], ["a", "bc"])],
)
async def test_embeddings(client: openai.AsyncOpenAI, given: Any, texts: list[str], encoding: Any) -> None:
    answer = await client.embeddings.create(model="demo", input=given, encoding_format=encoding)
    assert (answer.object, answer.model) == ("list", "demo")
    assert [one.index for one in answer.data] == list(range(len(texts)))
    for one, text in zip(answer.data, texts, strict=True):
        vector = one.embedding
        if encoding == "base64":  # asked for by name, the client hands it on
            data = base64.b64decode(vector)  # type: ignore[arg-type]
            vector = list(struct.unpack(f"<{len(data) // 4}f", data))
        assert vector == pytest.approx(fake_vector(list(map(ord, text))))
    num_tokens = sum(map(len, texts))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)


async def test_the_clients_default_and_dimensions(client: openai.AsyncOpenAI, server: RunningServer) -> None:
    answer = await client.embeddings.create(model="demo", input="abc", dimensions=2, user="me")
    assert answer.data[0].embedding == pytest.approx(fake_vector([97, 98, 99])[:2])
    await server.settled()
    record = server.records[-1]
    assert (record.endpoint, record.outcome, record.user, record.num_prompt_tokens) == ("embeddings", "stop", "me", 3)
    assert record.num_output_tokens == 0
    metrics = server.state.metrics.render(server.state.snapshot()).decode()
    assert 'penstock_requests_total{endpoint="embeddings",outcome="stop"} 1.0' in metrics
    assert "penstock_request_duration_seconds_count 1.0" in metrics


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": [1.5]}, "input[0]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a" * (MAX_MODEL_LEN + 1)}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 5}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "priority": 1}, "priority"),
        ({"input": "a", "stream": True}, "stream"),
        ({}, "input"),
    ],
)
async def test_what_is_wrong_is_named(server: RunningServer, body: dict[str, Any], param: str) -> None:
    answer = await post(server, "/v1/embeddings", model="demo", **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_what_is_too_long_is_cut_when_asked_for(server: RunningServer) -> None:
    for limit, length in ((-1, MAX_MODEL_LEN), (7, 7)):
        answer = await post(server, "/v1/embeddings", model="demo", input="ab" * 4000, truncate_prompt_tokens=limit)
        assert answer.json()["usage"]["prompt_tokens"] == length


async def test_errors_of_the_engine_have_their_status(server: RunningServer) -> None:
    server.engine.refusal = QueueFullError("full", retry_after_s=3)
    answer = await post(server, "/v1/embeddings", model="demo", input="a")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert (await post(server, "/v1/embeddings", model="other", input="a")).status_code == 404


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
async def test_scores(server: RunningServer, path: str) -> None:
    by_cosine = (await post(server, path, model="demo", text_1="ab", text_2=["ab", "zzzz"])).json()
    assert by_cosine["data"][0]["score"] == pytest.approx(1)
    assert by_cosine["data"][1]["score"] < 0.99
    assert by_cosine["usage"]["prompt_tokens"] == 8
    server.text.tasks = CROSS_ENCODER
    pairs = (await post(server, path, text_1=["a", "b"], text_2=["cc", "ddd"])).json()
    assert [(one["index"], one["object"]) for one in pairs["data"]] == [(0, "score"), (1, "score")]
    assert [one["score"] for one in pairs["data"]] == pytest.approx([1 / 3, 1 / 4])
    wrong = await post(server, path, text_1=["a", "b"], text_2=["c"])
    assert wrong.status_code == 400


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_rankings(server: RunningServer, path: str) -> None:
    server.text.tasks = CROSS_ENCODER
    documents = ["long document", "doc", {"text": "a document"}]
    whole = (await post(server, path, model="demo", query="q", documents=documents)).json()
    assert [one["index"] for one in whole["results"]] == [1, 2, 0]
    assert whole["results"][1]["document"] == {"text": "a document"}
    assert whole["meta"]["billed_units"] == {"search_units": 1}
    assert (whole["model"], whole["usage"]["total_tokens"]) == ("demo", 3 + len("long documentdoca document"))
    only = {"top_n": 1, "return_documents": False}
    best = (await post(server, path, model="demo", query="q", documents=documents, **only)).json()
    assert best["results"] == [{"index": 1, "relevance_score": pytest.approx(1 / 4)}]
    for body, param in (
        ({"documents": []}, "documents"),
        ({"documents": ["a"], "top_n": 0}, "top_n"),
        ({"documents": ["a"], "max_tokens_per_doc": 5}, "max_tokens_per_doc"),
        ({"documents": [{"title": "a"}]}, "documents[0].title"),
    ):
        answer = await post(server, path, model="demo", query="q", **body)
        assert (answer.status_code, answer.json()["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
async def test_labels(server: RunningServer, path: str) -> None:
    server.text.tasks = CLASSIFIER
    answer = (await post(server, path, model="demo", input=["a", "bb"])).json()
    assert [one["label"] for one in answer["data"]] == ["wild", "deep"]
    assert [one["num_classes"] for one in answer["data"]] == [3, 3]
    assert sum(answer["data"][0]["probs"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("tasks", "path", "body", "words"),
    [
        (CLASSIFIER, "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "not generate text"),
        (CLASSIFIER, "/v1/completions", {"prompt": "a"}, "not generate text"),
        (CLASSIFIER, "/v1/embeddings", {"input": "a"}, "not embed texts"),
        (CLASSIFIER, "/v1/score", {"text_1": "a", "text_2": "b"}, "not score pairs"),
        (CLASSIFIER, "/v1/rerank", {"query": "a", "documents": ["b"]}, "not rerank documents"),
        (None, "/v1/classify", {"input": "a"}, "not classify texts"),
    ],
)
async def test_what_the_model_is_not_for(
    server: RunningServer, tasks: ModelTasks | None, path: str, body: dict[str, Any], words: str
) -> None:
    if tasks is not None:
        server.text.tasks = tasks
    answer = await post(server, path, model="demo", **body)
    assert answer.status_code == 400
    assert f"does {words}" in answer.text
    assert ", ".join(server.text.tasks.names) in answer.text


async def test_ollamas_client(server: RunningServer) -> None:
    client = ollama.AsyncClient(host=server.url)
    answer = await client.embed(model="demo:latest", input=["ab", "cde"])
    assert [list(vector) for vector in answer.embeddings] == [
        pytest.approx(fake_vector(list(map(ord, text)))) for text in ("ab", "cde")
    ]
    assert answer.prompt_eval_count == 5
    cut = await client.embed(model="demo", input="ab" * 4000, dimensions=2)
    assert (len(cut.embeddings[0]), cut.prompt_eval_count) == (2, MAX_MODEL_LEN)
    with pytest.raises(ollama.ResponseError):
        await client.embed(model="demo", input="ab" * 4000, truncate=False)


async def test_a_client_that_leaves_ends_its_requests(server: RunningServer) -> None:
    server.engine.hold.clear()
    async with server.client() as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/embeddings", json={"model": "demo", "input": ["a", "b"]}, timeout=0.2)
    await server.until(lambda: len(server.engine.aborted) == 2)
    server.engine.hold.set()
