"""A server with a fake engine: everything of the protocol is real but the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from penstock.config.settings import Settings

from .fakes import FakeEngine, RunningServer, start_server


@pytest.fixture
def settings() -> Settings:
    """Overridden by modules that need others."""
    return Settings(port=0, request_timeout=20.0, drain_timeout=5.0)


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[RunningServer]:
    async with start_server(settings) as running:
        yield running
        await asyncio.wait_for(running.settled(), 5)
        assert running.engine.num_open == 0, "every sequence was ended"


@pytest.fixture
def engine(server: RunningServer) -> FakeEngine:
    return server.engine
