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
}


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
        assert '"unknown_field"' in answer.text
        streamed = await http.post(path, json={**BODIES[path], "stream": True})
        if streamed.status_code == 200:
            assert '"unknown_field"' in streamed.text
        wrong = {**BODIES[path], "model": 3, "inputs": 3}
        assert (await http.post(path, json=wrong)).status_code == 400
        many = {**BODIES[path], **{f"x{index}": 1 for index in range(100)}}
        assert (await http.post(path, json=many)).status_code == 400


async def test_without_the_setting_they_are_refused(server: RunningServer) -> None:
    object.__setattr__(server.state.settings, "lenient", False)
    async with server.client() as http:
        for path, body in BODIES.items():
            assert (await http.post(path, json=body)).status_code == 400
