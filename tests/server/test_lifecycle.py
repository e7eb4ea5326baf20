"""A server's life with a fake engine: it listens while it loads, drains, hurries, and replaces a dead engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from penstock.base.errors import CheckpointError, EngineDeadError
from penstock.config.settings import Settings
from penstock.observability.metrics import ServerInfo
from penstock.server import lifecycle as lifecycle_module
from penstock.server.app import build_app
from penstock.server.http_server import HttpServer
from penstock.server.lifecycle import MAX_RESTARTS, Lifecycle
from penstock.server.listen import bind
from penstock.server.state import Engine, ServerState
from penstock.server.text import TextLayer

from .fakes import FakeEngine, FakeText

BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}


@dataclass
class Life:
    """A lifecycle in progress, with the engines it has started."""

    state: ServerState
    http: HttpServer
    lifecycle: Lifecycle
    running: asyncio.Task[None]
    engines: list[FakeEngine] = field(default_factory=list)
    ready: list[str] = field(default_factory=list)

    async def get(self, path: str) -> int:
        async with httpx.AsyncClient(verify=False) as http:
            return (await http.get(self.http.url + path)).status_code

    async def ask(self, **change: Any) -> httpx.Response:
        async with httpx.AsyncClient(timeout=20, verify=False) as http:
            return await http.post(self.http.url + "/v1/chat/completions", json={**BODY, **change})

    async def until_ready(self) -> None:
        async with asyncio.timeout(10):
            while not self.state.readiness().is_ok:  # noqa: ASYNC110 - polls a property
                await asyncio.sleep(0.005)


@pytest.fixture
def loaded(request: pytest.FixtureRequest) -> asyncio.Event:
    """Engines start when it is set, which it is unless a test asks for "later"."""
    event = asyncio.Event()
    if getattr(request, "param", "now") == "now":
        event.set()
    return event


@pytest.fixture
async def life(loaded: asyncio.Event) -> AsyncIterator[Life]:
    settings = Settings(port=0, drain_timeout=5.0)
    state = ServerState(settings, ["demo"], ServerInfo(version="0", model="demo"))
    http = HttpServer(build_app(state), bind(settings))
    engines: list[FakeEngine] = []
    ready: list[str] = []

    async def start_engine() -> Engine:
        await loaded.wait()
        engines.append(FakeEngine())
        return engines[-1]

    async def load_text(_: Engine) -> TextLayer:
        return FakeText()

    lifecycle = Lifecycle(
        state, http, start_engine=start_engine, load_text=load_text, on_ready=lambda: ready.append(http.url)
    )
    life = Life(state, http, lifecycle, asyncio.create_task(lifecycle.run()), engines, ready)
    yield life
    for _ in range(2):
        lifecycle.stop()
    await asyncio.wait([life.running], timeout=15)
    assert life.running.done()


@pytest.mark.parametrize("loaded", ["later"], indirect=True)
async def test_it_listens_while_it_loads(life: Life, loaded: asyncio.Event) -> None:
    await life.http.wait_started()
    assert await life.get("/health/live") == 200
    assert await life.get("/health/ready") == 503
    assert life.ready == []
    loaded.set()
    await life.until_ready()
    assert await life.get("/health/ready") == 200
    assert life.ready == [life.http.url]


async def test_draining_finishes_what_runs_and_refuses_the_rest(life: Life) -> None:
    await life.until_ready()
    engine = life.engines[0]
    engine.hold.clear()
    asking = asyncio.create_task(life.ask())
    while not engine.num_open:  # noqa: ASYNC110 - polls a property
        await asyncio.sleep(0.005)
    life.lifecycle.stop()
    assert await life.get("/health/ready") == 503
    assert await life.get("/health/live") == 200
    refused = await life.ask()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert not life.running.done()
    engine.hold.set()
    assert (await asking).json()["choices"][0]["message"]["content"] == "You said: hello"
    await asyncio.wait_for(life.running, 10)
    with pytest.raises(httpx.ConnectError):
        await life.get("/health/live")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_second_stop_ends_at_once_with_an_error(life: Life, is_stream: bool) -> None:
    await life.until_ready()
    engine = life.engines[0]
    asking = asyncio.create_task(life.ask(stream=is_stream))
    while not engine.num_open:  # noqa: ASYNC110 - polls a property
        await asyncio.sleep(0)
    engine.hold.clear()
    life.lifecycle.stop()
    life.lifecycle.stop()
    answer = await asking
    assert "shut down before the answer" in answer.text
    assert "[DONE]" not in answer.text
    await asyncio.wait_for(life.running, 10)
    assert not engine.is_alive


async def test_the_drain_has_an_end(life: Life) -> None:
    await life.until_ready()
    object.__setattr__(life.state.settings, "drain_timeout", 0.1)
    engine = life.engines[0]
    engine.hold.clear()
    asking = asyncio.create_task(life.ask())
    while not engine.num_open:  # noqa: ASYNC110 - polls a property
        await asyncio.sleep(0.005)
    life.lifecycle.stop()
    assert (await asking).status_code == 503
    await asyncio.wait_for(life.running, 10)


async def test_a_dead_engine_is_replaced(life: Life) -> None:
    await life.until_ready()
    life.engines[0].is_alive = False
    life.state.observe_engine()
    async with asyncio.timeout(10):
        while len(life.engines) < 2:  # noqa: ASYNC110 - polls a list
            await asyncio.sleep(0.005)
    await life.until_ready()
    assert (await life.ask()).status_code == 200
    assert len(life.ready) == 1, "readiness is announced once"


async def test_an_engine_that_keeps_dying_ends_the_server(life: Life) -> None:
    for count in range(1, MAX_RESTARTS + 2):
        async with asyncio.timeout(10):
            while len(life.engines) < count or life.state.engine is not life.engines[-1]:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        life.engines[-1].is_alive = False
        life.state.observe_engine()
    with pytest.raises(EngineDeadError, match="4 times"):
        await asyncio.wait_for(life.running, 10)


async def test_a_failing_start_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle_module, "LAST_ANSWERS_S", 0.1)
    settings = Settings(port=0)
    state = ServerState(settings, ["demo"], ServerInfo(version="0", model="demo"))
    http = HttpServer(build_app(state), bind(settings))

    async def start_engine() -> Engine:
        raise CheckpointError("The checkpoint is corrupt.")

    async def load_text(_: Engine) -> TextLayer:
        return FakeText()

    lifecycle = Lifecycle(state, http, start_engine=start_engine, load_text=load_text, on_ready=lambda: None)
    with pytest.raises(CheckpointError, match="corrupt"):
        await asyncio.wait_for(lifecycle.run(), 10)
