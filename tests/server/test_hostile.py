"""Careless and hostile input: a 4xx that names the field, nothing left behind, and the next request is served."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from penstock.config.settings import Settings
from penstock.messages.bounds import MAX_BODY_BYTES, MAX_JSON_DEPTH
from penstock.server.openai.schema import NO_OP_VALUES, ChatRequest

from .fakes import MAX_MODEL_LEN, REPLY, RunningServer, start_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TEXT: dict[str, Any] = {"model": "demo", "prompt": "hi", "max_tokens": 4}


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings(port=0, request_timeout=20.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(settings: Settings) -> AsyncIterator[RunningServer]:
    """One server for all tests of this module: it has to survive them anyway."""
    async with start_server(settings) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def server(shared: RunningServer) -> AsyncIterator[RunningServer]:
    shared.records.clear()
    shared.text.requests.clear()
    yield shared
    await shared.settled()


async def refused(server: RunningServer, path: str, body: bytes, status: int = 400) -> dict[str, Any]:
    """Sends `body`, checks that it is refused in OpenAI's shape, and returns the error."""
    async with server.client() as http:
        answer = await http.post(path, content=body)
        assert answer.status_code == status, answer.text
        error: dict[str, Any] = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(answer.content) < 2000, "an error does not repeat the request"
        again = await http.post("/v1/completions", json=TEXT)
        assert again.json()["choices"][0]["text"] == REPLY[:4]
    await server.settled()
    assert [record.outcome for record in server.records] == ["refused", "length"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 10**9), ("n", 0), ("n", -1), ("n", 10**400), ("n", 1.5), ("n", "3"), ("n", True), ("n", []),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.01),
        ("top_k", -2), ("top_k", 10**7), ("min_p", 1.5), ("presence_penalty", 3), ("frequency_penalty", -3),
        ("repetition_penalty", 0), ("seed", 2**64), ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 10**12),
        ("min_tokens", -1), ("min_tokens", 5), ("prompt_logprobs", 21), ("priority", 10**6), ("logit_bias", {"1": 101}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {str(i): 1 for i in range(2000)}),
        ("stop", [""]), ("stop", "x" * 2000),
        ("stop", ["a"] * 17), ("stop_token_ids", list(range(200))),
        ("stop_token_ids", ["a"]), ("bad_words", ["x" * 300]),
        ("user", "u" * 600), ("cache_salt", ""), ("cache_salt", "s" * 300), ("metadata", {"k": "v" * 600}),
        ("metadata", {str(i): "v" for i in range(20)}), ("metadata", {"k": 1}),
        ("stream_options", {"include_usage": True}),
        ("typical_p", 0), ("top_n_sigma", -1), ("xtc_probability", 1.1), ("xtc_threshold", -0.1),
        ("dynatemp_range", 3), ("dynatemp_exponent", 0), ("dry_multiplier", -1), ("mirostat", 1), ("mirostat_tau", -1),
        ("dry_base", 0.5),
        ("dry_allowed_length", 0), ("dry_sequence_breakers", [""]), ("dry_sequence_breakers", ["x"] * 17),
        ("stream", "yes"), ("nonsense", 1), ("max_new_tokens", 5), ("", 1), ("ignore_eos", 1),
        ("skip_special_tokens", "no"), ("safety_identifier", "s" * 600), ("prompt_cache_key", "s" * 600),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_values_out_of_bounds(server: RunningServer, path: str, field: str, value: object) -> None:
    base = CHAT if "chat" in path else TEXT
    error = await refused(server, path, json.dumps({**base, field: value}).encode())
    assert error["param"] is not None
    assert field in error["param"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]},
         "messages[0].content[0].b"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": 5}, "max_tokens"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
        ({"tools": [{"type": "function", "function": {"name": "f", "mood": True}}]}, "tools[0].function.mood"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 600}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"thinking_token_budget": 0}, "thinking_token_budget"),
        ({"thinking_token_budget": 9, "reasoning_effort": "low"}, "thinking_token_budget"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"store": True}, "store"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ],
)  # fmt: skip
async def test_chat_requests_that_cannot_be_served(server: RunningServer, change: dict[str, Any], param: str) -> None:
    error = await refused(server, "/v1/chat/completions", json.dumps({**CHAT, **change}).encode())
    assert error["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"), ({"prompt": ["a", 1]}, "prompt"), ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [[1, "a"]]}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": ["a"] * 2000}, "prompt"),
        ({"prompt": [[1.5]]}, "prompt"), ({"best_of": 5}, "best_of"), ({"suffix": 5}, "suffix"),
        ({"suffix": "x", "prompt": [1]}, "suffix"),
        ({"suffix": "x", "echo": True}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"), ({"tools": []}, "tools"), ({"messages": []}, "messages"),
        ({"prompt": ""}, "prompt"),
        ({"length_penalty": 2.0}, "length_penalty"), ({"early_stopping": True}, "early_stopping"),
        ({"use_beam_search": True, "stream": True}, "stream"), ({"use_beam_search": True, "top_p": 0.5}, "top_p"),
        ({"use_beam_search": True, "n": 17}, "beam_width"),
        ({"use_beam_search": True, "n": 3, "best_of": 2}, "best_of"),
        ({"use_beam_search": True, "length_penalty": 99}, "length_penalty"),
        ({"use_beam_search": True, "response_format": {"type": "json_object"}}, "response_format"),
    ],
)  # fmt: skip
async def test_completions_that_cannot_be_served(server: RunningServer, change: dict[str, Any], param: str) -> None:
    error = await refused(server, "/v1/completions", json.dumps({**TEXT, **change}).encode())
    assert error["param"] is not None
    assert error["param"].split("[")[0] == param


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"{", b"nonsense", b"\xff\xfe", b'{"model": "demo"', b'"' + b"x" * 10_000_000 + b'"',
        b'{"model": "demo", "messages": [], "temperature": NaN}',
        b'{"model": "demo", "messages": [], "temperature": Infinity}',
        b'{"model": "demo", "messages": [], "temperature": -Infinity}',
        b'{"model": "demo", "messages": [], "temperature": 1e999}',
        b'{"model": "demo", "messages": [], "n": ' + b"1" * 10_000 + b"}", b"[" * 200_000,
        b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "demo", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "demo", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "demo", "messages": [], "chat_template_kwargs": {"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
        b'{"' + b"x" * 1_000_000 + b'": 1}',
    ],
)  # fmt: skip
async def test_bodies_that_are_no_request(server: RunningServer, body: bytes) -> None:
    await refused(server, "/v1/chat/completions", body)


@pytest.mark.parametrize("field", ["chat_template_kwargs", "tools"])
async def test_nesting_is_bounded(server: RunningServer, field: str) -> None:
    deep = _nested(MAX_JSON_DEPTH + 1)
    inner = f'{{"a": {deep}}}'
    if field == "tools":
        inner = f'[{{"type": "function", "function": {{"name": "f", "parameters": {inner}}}}}]'
    body = json.dumps(CHAT)[:-1] + f', "{field}": {inner}}}'
    error = await refused(server, "/v1/chat/completions", body.encode())
    assert error["param"] == field


async def test_text_full_of_brackets_is_not_nesting(server: RunningServer) -> None:
    async with server.client() as http:
        body = {**CHAT, "messages": [{"role": "user", "content": "[{" * 500}]}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200


async def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(server: RunningServer) -> None:
    body = {**TEXT, "prompt": "x" * 10_000_000}
    error = await refused(server, "/v1/completions", json.dumps(body).encode())
    assert error["code"] == "context_length_exceeded"
    assert str(MAX_MODEL_LEN) in error["message"]
    assert "10000000" in error["message"]


async def test_a_body_that_is_too_long_is_refused_before_it_is_sent(server: RunningServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {MAX_BODY_BYTES + 1}\r\n\r\n"
        connection.sendall(head.encode())
        connection.setblocking(False)
        answer = b""
        await server.until(lambda: server.records)
        async with httpx.AsyncClient() as http:  # the server still answers others
            assert (await http.get(f"{server.url}/health/live")).status_code == 200
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()
    assert server.records[0].error_code == "body_too_large"


async def test_a_chunked_body_that_grows_too_long_is_refused(server: RunningServer) -> None:
    async def pieces() -> Any:
        for _ in range(MAX_BODY_BYTES // 2**20 + 2):
            yield b"x" * 2**20

    async with server.client() as http:
        try:
            answer = await http.post("/v1/completions", content=pieces())
            assert answer.status_code == 413
        except httpx.WriteError:
            pass  # the server closed the connection while the client was still sending
    await server.settled()
    assert [record.error_code for record in server.records] == ["body_too_large"]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e9", "soon", "21"])
async def test_bad_timeouts_are_refused(server: RunningServer, value: str) -> None:
    async with server.client() as http:
        answer = await http.post("/v1/completions", json=TEXT, headers={"x-request-timeout": value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "x-request-timeout"
        assert (await http.post("/v1/completions", json=TEXT, headers={"x-request-timeout": "5"})).status_code == 200


async def test_an_unknown_model_is_a_404_that_lists_the_known(server: RunningServer) -> None:
    error = await refused(server, "/v1/completions", json.dumps({**TEXT, "model": "gpt-5"}).encode(), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "demo" in error["message"]


async def test_the_content_type_does_not_matter(server: RunningServer) -> None:
    async with server.client() as http:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            answer = await http.post("/v1/completions", content=json.dumps(TEXT), headers={"content-type": kind})
            assert answer.status_code == 200


@pytest.mark.parametrize(("given", "kept"), [("abc-1", True), ("a" * 129, False), ("a b", False), ('"x"', False)])
async def test_request_ids(server: RunningServer, given: str, kept: bool) -> None:
    async with server.client() as http:
        answer = await http.post("/v1/completions", json=TEXT, headers={"x-request-id": given})
        assert (answer.headers["x-request-id"] == given) == kept
        assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}"
        refusal = await http.post("/v1/completions", content=b"", headers={"x-request-id": "bad-1"})
        assert refusal.headers["x-request-id"] == "bad-1"
        twins = await http.post("/v1/completions", json=TEXT, headers={"x-request-id": "bad-1"})
        assert twins.status_code == 200, "ids of clients need not be unique"


@pytest.mark.parametrize(("path", "method", "status"), [
    ("/v1/completions", "GET", 405), ("/v1/nothing", "POST", 404), ("/", "GET", 405), ("/v1/completions/", "POST", 404),
    ("/metrics", "POST", 405),
])  # fmt: skip
async def test_wrong_routes_answer_in_openais_shape(server: RunningServer, path: str, method: str, status: int) -> None:
    async with server.client() as http:
        answer = await http.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("name", sorted(NO_OP_VALUES))
async def test_no_op_values_are_accepted(server: RunningServer, name: str) -> None:
    path, base = ("/v1/chat/completions", CHAT) if name in ChatRequest.__struct_fields__ else ("/v1/completions", TEXT)
    async with server.client() as http:
        for value in (None, *NO_OP_VALUES[name]):
            answer = await http.post(path, json={**base, name: value})
            assert answer.status_code == 200, answer.text
