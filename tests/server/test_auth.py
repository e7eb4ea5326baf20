"""Keys: every route but two answers 401 without one, however its path is spelled."""

from __future__ import annotations

import re
from typing import Any

import pytest
from starlette.types import Message

from penstock.base.errors import ConfigError
from penstock.config.settings import Settings
from penstock.server.app import build_app, routes
from penstock.server.auth import PUBLIC_PATHS
from penstock.server.listen import bind

from .fakes import RunningServer

KEYS = ("right-key", "other-key")


@pytest.fixture
def settings() -> Settings:
    return Settings(port=0, api_key=KEYS)


def all_routes(server: RunningServer) -> list[tuple[str, str]]:
    """(method, path) of every route of the application."""
    return [
        (method, re.sub(r"\{.*?\}", "demo", route.path))
        for route in routes(server.state)
        for method in route.methods or ()
    ]


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Basic right-key", "right-key", "Bearer right-keyx",
               "Bearer right-ke", "Bearer right-key,other-key"],
)  # fmt: skip
async def test_every_route_needs_a_key_but_two(server: RunningServer, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    public = set()
    async with server.client() as http:
        for method, path in all_routes(server):
            answer = await http.request(method, path, headers=headers)
            if answer.status_code == 401:
                assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"
            else:
                public.add(path)
        for path in ("/", "/nothing", "/v1", "/docs", "/openapi.json", "/health/"):
            assert (await http.get(path, headers=headers)).status_code == 401
    assert public == PUBLIC_PATHS
    assert server.records == []


@pytest.mark.parametrize("key", KEYS)
async def test_a_key_opens_every_route(server: RunningServer, key: str) -> None:
    async with server.client(headers={"authorization": f"bearer {key}"}) as http:
        for method, path in all_routes(server):
            assert (await http.request(method, path)).status_code in (200, 400, 404)


async def ask(app: Any, **scope: Any) -> int:
    """The status of a request built by hand, as no HTTP parser would let it through."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    base = {"type": "http", "method": "GET", "headers": [], "query_string": b"", "root_path": "", "http_version": "1.1",
            "scheme": "http", "server": ("x", 1), "client": ("y", 2)}  # fmt: skip
    await app({**base, **scope}, receive, send)
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    "path", ["//health/live", "/health/live/", "/health/live/../../metrics", "/health/live;/metrics", "/HEALTH/LIVE",
             "/health/live%2f..%2fmetrics", "/metrics?x=/health/live", "/health/live\x00", "health/live", ""],
)  # fmt: skip
async def test_spellings_of_public_paths_are_not_public(server: RunningServer, path: str) -> None:
    assert await ask(build_app(server.state), path=path) == 401


@pytest.mark.parametrize(
    ("root_path", "path", "status"),
    [
        ("/health/live", "/metrics", 401), ("/metrics", "/metrics/health/live", 200), ("/x", "/x/metrics", 401),
        ("/x", "/x/health/live", 200), ("/health", "/health/live", 401), ("/health/live", "/health/live", 401),
    ],
)  # fmt: skip
async def test_the_dispatched_path_decides(server: RunningServer, root_path: str, path: str, status: int) -> None:
    """A root_path moves what is dispatched; the check moves with it."""
    assert await ask(build_app(server.state), root_path=root_path, path=path) == status


async def test_two_authorization_headers_are_none(server: RunningServer) -> None:
    right = (b"authorization", b"Bearer right-key")
    app = build_app(server.state)
    assert await ask(app, path="/metrics", headers=[right]) == 200
    assert await ask(app, path="/metrics", headers=[right, (b"authorization", b"Bearer wrong")]) == 401
    assert await ask(app, path="/metrics", headers=[right, right]) == 401


async def test_websockets_are_closed(server: RunningServer) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await build_app(server.state)({"type": "websocket", "path": "/metrics", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_public_bind_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="API key"):
        bind(Settings(host="0.0.0.0", port=0))
    bind(Settings(host="0.0.0.0", port=0, api_key=KEYS)).close()


async def test_a_taken_port_is_named(server: RunningServer) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=str(port)) as error:
        bind(Settings(port=port))
    assert "--port" in error.value.remedy
