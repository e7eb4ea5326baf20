"""The OpenAPI document is complete, and whatever it allows (and does not) is never answered with a 5xx."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as limits
from schemathesis import GenerationMode

from penstock.config.settings import Settings
from penstock.server.app import ROUTES
from penstock.server.openapi import REQUESTS, openapi_document

from .fakes import start_server

EXAMPLES = 6


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a fake engine in a thread of its own."""
    data = tmp_path_factory.mktemp("data") / "inner"
    yield from serve_in_thread(Settings(port=0, data_directory=str(data), request_timeout=20.0))


def serve_in_thread(settings: Settings) -> Iterator[str]:
    started, loop, found = threading.Event(), asyncio.new_event_loop(), {}

    async def serve() -> None:
        async with start_server(settings) as server:
            found["url"], found["stop"] = server.url, asyncio.Event()
            started.set()
            await found["stop"].wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(10)
    yield str(found["url"])
    loop.call_soon_threadsafe(found["stop"].set)
    thread.join(20)
    loop.close()


def test_it_names_every_route_and_every_request() -> None:
    document = openapi_document(ROUTES, "1", ["demo"])
    named = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert named == {(method, path.replace(":path", "")) for method, path, _ in ROUTES}
    for method, path, _ in ROUTES:
        has_body = "requestBody" in document["paths"][path.replace(":path", "")][method.lower()]
        bodyless = path.endswith("/cancel")
        assert has_body == (method == "POST" and not bodyless), path
    for route in REQUESTS:
        assert tuple(route.split(" ")) in {(method, path) for method, path, _ in ROUTES}
    components = document["components"]["schemas"]
    fields = next(one for one in components.values() if {"n", "messages"} <= one.get("properties", {}).keys())
    assert fields["additionalProperties"] is False
    assert fields["properties"]["model"] == {"type": "string", "enum": ["demo"]}
    temperature = fields["properties"]["temperature"]["anyOf"]
    assert {"type": "number", "minimum": 0.0, "maximum": 2.0} in temperature
    assert fields["properties"]["store"]["enum"] == [None, False]


def test_fuzzing_finds_no_server_error(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    statuses = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not list(operation.body):
                continue

            @limits(
                max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def run(case: Any) -> None:
                answer = case.call()
                statuses.add(answer.status_code)
                assert answer.status_code < 500, answer.text

            run()
    assert {200, 400} <= statuses


def test_the_data_directory_is_private(tmp_path: Path) -> None:
    from penstock.server.openai.batch_store import BatchStore

    BatchStore(tmp_path / "data", 0.0).close()
    assert (tmp_path / "data" / "batches.sqlite3").stat().st_mode & 0o077 == 0
