"""The engine process and its client: start, stream, abort, death on either side."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
import pytest

from penstock.base.errors import CheckpointError, DrainingError, EngineDeadError, MemoryPlanError
from penstock.frontend.engine_client import EngineClient
from penstock.messages import EngineRequest, FinishReason, SamplingParams
from whole_engine import engine_config


@pytest.fixture
async def client(checkpoint: Path) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(engine_config(checkpoint), lambda _progress: None)
    yield client
    client.kill()


def make_request(request_id: str, max_tokens: int = 8) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=[5, 6, 7],
        sampling=SamplingParams(temperature=0.0, seed=0),
        max_tokens=max_tokens,
        arrival_s=time.monotonic(),
    )


async def tokens_of(client: EngineClient, request_id: str, max_tokens: int = 8) -> list[int]:
    tokens: list[int] = []
    async for output in client.submit(make_request(request_id, max_tokens)):
        tokens += output.token_ids
    return tokens


async def test_streams_are_whole_and_alike(client: EngineClient) -> None:
    alone = await tokens_of(client, "alone")
    assert len(alone) == 8
    together = await asyncio.gather(*(tokens_of(client, f"together-{index}") for index in range(20)))
    assert all(tokens == alone for tokens in together)
    assert client.num_streams == 0
    assert client.ready.vocab_size == 211
    assert client.stats.num_output_tokens == 21 * 8


async def test_a_slow_reader_gets_everything_merged(client: EngineClient) -> None:
    stream = client.submit(make_request("slow", 30))
    await tokens_of(client, "behind it", 40)  # ends later, and nothing has read the slow stream meanwhile
    outputs = [output async for output in stream]
    assert len(outputs) == 1
    assert len(outputs[0].token_ids) == 30
    assert outputs[0].finish_reason is FinishReason.LENGTH


async def test_abort_ends_the_stream(client: EngineClient) -> None:
    stream = client.submit(make_request("aborted", 450))
    first = await anext(stream)
    assert first.finish_reason is None
    client.abort(["aborted", "unknown"])
    *_, last = [output async for output in stream]
    assert last.finish_reason is FinishReason.ABORT
    assert last.num_output_tokens < 450


async def test_death_of_the_engine_ends_every_stream_with_an_error(client: EngineClient) -> None:
    stream = client.submit(make_request("doomed", 450))
    await anext(stream)
    os.kill(client.pid, signal.SIGKILL)
    *_, last = [output async for output in stream]
    assert last.finish_reason is FinishReason.ERROR
    assert last.error is not None
    assert last.error.code == "engine_dead"
    await asyncio.wait_for(client.closed, 5)
    assert not client.is_alive
    with pytest.raises(EngineDeadError):
        client.submit(make_request("late"))


async def test_shutdown_lets_open_requests_finish_and_takes_no_more(client: EngineClient) -> None:
    stream = client.submit(make_request("open", 100))
    shutdown = asyncio.create_task(client.shutdown(drain_s=20))
    await asyncio.sleep(0)
    with pytest.raises(DrainingError):
        client.submit(make_request("late"))
    outputs = [output async for output in stream]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    await shutdown
    assert not client.is_alive


async def test_a_missing_checkpoint_and_too_little_memory_are_named(checkpoint: Path, tmp_path: Path) -> None:
    config = engine_config(checkpoint)
    with pytest.raises(CheckpointError):
        await EngineClient.start(msgspec.structs.replace(config, model_path=str(tmp_path)), lambda _progress: None)
    with pytest.raises(MemoryPlanError):
        await EngineClient.start(msgspec.structs.replace(config, max_memory_bytes=1 << 20), lambda _progress: None)


PARENT = """
    import asyncio, pathlib, sys
    sys.path[:0] = {paths!r}
    from penstock.frontend.engine_client import EngineClient
    from whole_engine import engine_config

    async def main():
        client = await EngineClient.start(engine_config(pathlib.Path({checkpoint!r})), lambda _progress: None)
        print(client.pid, flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


def test_the_engine_dies_with_its_parent(checkpoint: Path) -> None:
    here = Path(__file__).parent.parent
    paths = [str(here / "end_to_end"), str(here)]
    code = textwrap.dedent(PARENT).format(paths=paths, checkpoint=str(checkpoint))
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    engine = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    assert engine.wait(timeout=5) is None or not engine.is_running()
