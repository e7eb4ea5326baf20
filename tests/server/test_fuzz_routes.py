"""tools/fuzz_routes.py in short: every route under fuzz, around a fake engine that is left empty."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fuzz_routes import SEEDS, fuzz

from penstock.config.settings import Settings

from .fakes import RunningServer

SECONDS = 3.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(port=0, request_timeout=20.0, data_directory=str(tmp_path / "data"), served_model_name=("served",))


async def test_no_route_fails(server: RunningServer) -> None:
    server.state.model_names = ["served"]
    fuzzer = await fuzz(server.url, SECONDS, seed=3)
    assert fuzzer.report.problems == []
    assert fuzzer.num_sent > 300
    assert {"200", "400", "404", "cut"} <= fuzzer.report.statuses.keys()
    async with asyncio.timeout(10):
        await server.settled()
    async with server.client() as http:
        for path, bodies in SEEDS.items():
            answer = await http.post(path, json=bodies[0])
            assert answer.status_code < 500, (path, answer.text)
