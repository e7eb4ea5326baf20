"""--lenient: unknown fields are left out and named in the answer; without it they are refused."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.config.settings import Settings

from .fakes import RunningServer

CHAT = [{"role": "user", "content": "hi", "unheard": 1}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "demo", "messages": CHAT, "extra": 1},
    "/v1/completions": {"model": "demo", "prompt": "hi", "extra": [], "unheard": {}},
    "/v1/generate": {"model": "demo", "prompt": "hi", "extra": 1, "unheard": 2},
    "/v1/messages": {"model": "demo", "max_tokens": 5, "messages": CHAT, "extra": 1},
    "/api/chat": {"model": "demo", "messages": CHAT, "options": {"extra": 1}, "stream": False},
    "/generate": {"inputs": "hi", "parameters": {"extra": 1}, "unheard": None},
    "/api/generate": {"model": "demo", "prompt": "hi", "options": {"extra": 1}, "unheard": 1, "stream": False},
    "/v1/responses": {"model": "demo", "input": "hi", "extra": 1, "unheard": 1, "store": False},
    "/v1/messages/count_tokens": {"model": "demo", "messages": CHAT, "extra": 1},
    "/v1/render": {"model": "demo", "messages": CHAT, "extra": 1},
    "/tokenize": {"model": "demo", "prompt": "hi", "extra": 1, "unheard": 1},
    "/detokenize": {"tokens": [1], "extra": 1, "unheard": 1},
    "/v1/embeddings": {"model": "demo", "input": "hi", "extra": 1, "unheard": 1},
    "/api/embed": {"model": "demo", "input": "hi", "extra": 1, "unheard": 1},
    "/v1/score": {"model": "demo", "text_1": "a", "text_2": "b", "extra": 1, "unheard": 1},
    "/v1/rerank": {"model": "demo", "query": "a", "documents": ["b"], "extra": 1, "unheard": 1},
}
# Their answers are bare lists: what could not be warned of is refused.
STRICT: dict[str, dict[str, Any]] = {"/embed": {"inputs": "hi", "extra": 1}, "/tokenize": {"inputs": "hi", "extra": 1}}


@pytest.fixture
def settings() -> Settings:
    return Settings(port=0, lenient=True)


@pytest.mark.parametrize("path", BODIES)
async def test_unknown_fields_are_named_in_the_warnings(server: RunningServer, path: str) -> None:
    async with server.client() as http:
        answer = await http.post(path, json=BODIES[path])
        assert answer.status_code == 200
        assert "extra" in answer.text
        assert "unheard" in answer.text
        said = "left out" if path == "/v1/rerank" else '"unknown_field"'  # Cohere's warnings are plain texts
        assert said in answer.text
        streamed = await http.post(path, json={**BODIES[path], "stream": True})
        if streamed.status_code == 200:
            assert said in streamed.text
        wrong = {**BODIES[path], "model": 3, "inputs": 3, "tokens": 3}
        assert (await http.post(path, json=wrong)).status_code == 400
        many = {**BODIES[path], **{f"x{index}": 1 for index in range(100)}}
        assert (await http.post(path, json=many)).status_code == 400


@pytest.mark.parametrize("path", STRICT)
async def test_where_no_warning_fits_they_are_refused(server: RunningServer, path: str) -> None:
    async with server.client() as http:
        refused = await http.post(path, json=STRICT[path])
        assert refused.status_code == 400
        assert "extra" in refused.text


async def test_without_the_setting_they_are_refused(server: RunningServer) -> None:
    object.__setattr__(server.state.settings, "lenient", False)
    async with server.client() as http:
        for path, body in BODIES.items():
            refused = await http.post(path, json=body)
            assert refused.status_code == 400
            assert "extra" in refused.text or "unheard" in refused.text, "it is named"
