"""The client side of an engine process: starts it, sends requests, and streams what comes back.

Owns: the engine's process handle and every open RequestStream.
One instance lives in one event loop; nothing here is thread-safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import cast

import msgspec

from penstock.base.errors import (
    CheckpointError,
    ConfigError,
    DrainingError,
    EngineDeadError,
    MemoryPlanError,
    PenstockError,
)
from penstock.config.engine import EngineConfig
from penstock.messages import (
    AbortRequest,
    EngineFatal,
    EngineInput,
    EngineReady,
    EngineRequest,
    EngineStats,
    ErrorInfo,
    FinishReason,
    OutputBatch,
    RequestOutput,
    RequestTimings,
    ShutdownRequest,
    StartupProgress,
)
from penstock.messages.wire import FrameBuffer, decode_message, encode_frame, frame

logger = logging.getLogger(__name__)

KILL_AFTER_S = 5.0
_START_ERRORS: dict[str, type[PenstockError]] = {
    error.code: error for error in (CheckpointError, ConfigError, MemoryPlanError)
}


class RequestStream:
    """The outputs of one request: `async for output in stream`. The last one has a finish_reason.

    A reader that is slower than the engine gets several steps merged into one output, so at most one output waits
    here, whatever the reader does.
    """

    __slots__ = ("_loop", "_pending", "_waiter", "is_finished", "request_id")

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.is_finished = False
        self._loop = loop
        self._pending: RequestOutput | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, output: RequestOutput) -> None:
        """Called by the client for every output of the engine."""
        self._pending = output if self._pending is None else merge_outputs(self._pending, output)
        if output.finish_reason is not None:
            self.is_finished = True
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while self._pending is None:
            if self.is_finished:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            await self._waiter
        output, self._pending = self._pending, None
        return output


def merge_outputs(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """`first` followed by `second`, as one output."""
    second.token_ids = first.token_ids + second.token_ids
    if first.logprobs is not None:
        second.logprobs = first.logprobs + (second.logprobs or [])
    if first.prompt_logprobs is not None:
        second.prompt_logprobs = first.prompt_logprobs
    return second


class EngineClient:
    """One engine process and the requests it works on.

    When the process dies, every open stream gets a final output with an EngineDeadError, and so does every later
    `submit`; `closed` resolves, and the owner decides whether to start another.
    """

    def __init__(self, process: subprocess.Popen[bytes], on_progress: Callable[[StartupProgress], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = process
        self._on_progress = on_progress
        self._transport: asyncio.WriteTransport | None = None
        self._streams: dict[str, RequestStream] = {}
        self._ready: asyncio.Future[EngineReady] = self._loop.create_future()
        self._is_draining = False
        self._emptied: asyncio.Future[None] | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self.stats = EngineStats()
        self.last_message_s = time.monotonic()

    @classmethod
    async def start(cls, config: EngineConfig, on_progress: Callable[[StartupProgress], None]) -> EngineClient:
        """Spawns an engine and waits until it is ready.

        Raises: CheckpointError, ConfigError or MemoryPlanError as the engine reported it; EngineDeadError when the
        process ended without a word.
        """
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - a fork at start-up; asyncio's own would add a child watcher
                [sys.executable, "-m", "penstock.engine", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": str(config.num_threads)},
            )
        finally:
            theirs.close()
        client = cls(process, on_progress)
        ours.setblocking(False)
        await client._loop.create_connection(lambda: _Protocol(client), sock=ours)
        client._write(frame(msgspec.json.encode(config)))
        try:
            await client._ready
        except BaseException:
            client.kill()
            raise
        return client

    @property
    def ready(self) -> EngineReady:
        return self._ready.result()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self.closed.done() and self._process.poll() is None

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def seconds_since_progress(self, now: float) -> float:
        """How long requests have been open without a word from the engine; 0 when there is nothing to do."""
        return now - self.last_message_s if self._streams else 0.0

    def submit(self, request: EngineRequest) -> RequestStream:
        """Sends a request. A refusal (queue full, can never fit) arrives as the stream's only output, with `error`.

        Raises: EngineDeadError, DrainingError.
        """
        if not self.is_alive:
            raise EngineDeadError("The engine is not running.", remedy="It is being restarted; retry in a few seconds.")
        if self._is_draining:
            raise DrainingError("The server is shutting down.", remedy="Send the request to another replica.")
        assert request.request_id not in self._streams, "request ids are unique"
        if not self._streams:
            self.last_message_s = time.monotonic()  # progress is due from now on
        stream = RequestStream(request.request_id, self._loop)
        self._streams[request.request_id] = stream
        self.send(request)
        return stream

    def abort(self, request_ids: list[str], finish_reason: FinishReason = FinishReason.ABORT) -> None:
        """Asks the engine to end requests; their streams end with its answer. Unknown ids are ignored."""
        open_ids = [request_id for request_id in request_ids if request_id in self._streams]
        if open_ids and self.is_alive:
            self.send(AbortRequest(open_ids, finish_reason))

    def send(self, message: EngineInput) -> None:
        self._write(encode_frame(message))

    async def shutdown(self, drain_s: float) -> None:
        """Takes no more requests, waits up to drain_s for the open ones, then ends the process."""
        self._is_draining = True
        self._emptied = self._loop.create_future()
        if self._streams and self.is_alive:
            await asyncio.wait((self._emptied, self.closed), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        if self.is_alive:
            self.abort(list(self._streams))
            self.send(ShutdownRequest(0.0))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self.closed), KILL_AFTER_S)
        self.kill()

    def kill(self) -> None:
        """Ends the process at once (idempotent)."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._transport is not None:
            self._transport.close()

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def connection_made(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def message_received(self, body: bytes) -> None:
        self.last_message_s = time.monotonic()
        match decode_message(body):
            case OutputBatch(outputs=outputs, stats=stats):
                if stats is not None:
                    self.stats = stats
                for output in outputs:
                    self._dispatch(output)
            case StartupProgress() as progress:
                self._on_progress(progress)
            case EngineReady() as ready:
                self._ready.set_result(ready)
            case EngineFatal(error=error):
                self._fail_start(_START_ERRORS.get(error.code, EngineDeadError)(error.message))

    def connection_lost(self) -> None:
        self._fail_start(
            EngineDeadError(
                f"The engine process ended before it was ready (exit status {self._process.poll()}).",
                remedy="Its last lines on standard error say why; `penstock doctor` checks the machine.",
            )
        )
        error = ErrorInfo.of(EngineDeadError("The engine process ended while the request ran.", remedy="Retry it."))
        now = time.monotonic()
        for request_id in list(self._streams):
            timings = RequestTimings(arrival_s=now, finished_s=now)
            self._dispatch(RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=error, timings=timings))
        if not self.closed.done():
            self.closed.set_result(None)

    def _fail_start(self, error: PenstockError) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)

    def _dispatch(self, output: RequestOutput) -> None:
        if output.finish_reason is None:
            stream = self._streams.get(output.request_id)
        else:
            stream = self._streams.pop(output.request_id, None)
            if self._emptied is not None and not self._streams and not self._emptied.done():
                self._emptied.set_result(None)
        if stream is not None:
            stream.push(output)


class _Protocol(asyncio.Protocol):
    """Connects the transport's callbacks to the client."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._frames = FrameBuffer()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: uvloop's transports are no subclasses of asyncio's.
        self._client.connection_made(cast(asyncio.WriteTransport, transport))

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            self._client.message_received(body)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._client.connection_lost()
