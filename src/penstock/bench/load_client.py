"""The load client: sends requests at their time over as many connections as that takes, and stamps what comes back.

Owns: the connections to one server, and the requests in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, cast

from penstock.bench.observation import Observation
from penstock.bench.plan import Message, PlannedRequest
from penstock.bench.response_reader import BrokenResponseError, ResponseReader
from penstock.bench.target import Connector, Target

MAX_IN_FLIGHT: Final = 20_000
CLIENT_LIMIT: Final = "client limit"  # the failure of a request that this client could not send


@dataclass(slots=True, eq=False)
class Exchange:
    """A request in flight. is_reused: it went out on a connection that had served before, and may have been closed."""

    seen: Observation
    payload: bytes
    on_end: Callable[[Observation], None]
    connection: Connection | None = None
    opening: asyncio.Task[None] | None = None
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    is_reused: bool = False
    is_over: bool = False


@dataclass(slots=True)
class Counts:
    """A running run, for whoever shows it."""

    num_sent: int = 0
    num_ended: int = 0
    num_failed: int = 0
    num_chunks: int = 0


class Connection(asyncio.Protocol):
    """One keep-alive connection; serves one exchange at a time."""

    def __init__(self, client: LoadClient) -> None:
        self._client = client
        self._exchange: Exchange | None = None
        self._reader: ResponseReader | None = None
        self._transport: asyncio.Transport | None = None
        self.is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio.Transport.
        self._transport = cast(asyncio.Transport, transport)

    def send(self, exchange: Exchange) -> None:
        assert self._transport is not None
        self._exchange = exchange
        exchange.connection = self
        self._reader = ResponseReader(exchange.seen, keeps_answer=exchange.seen.request.session != "")
        exchange.seen.sent_s = self._client.clock()
        self._transport.write(exchange.payload)

    def data_received(self, data: bytes) -> None:
        now_s = self._client.clock()
        exchange, reader = self._exchange, self._reader
        if exchange is None or reader is None:
            self.close()  # bytes that nobody asked for: whatever follows cannot be matched to a request
            return
        before = len(exchange.seen.chunk_s)
        try:
            is_complete = reader.feed(data, now_s)
        except BrokenResponseError as error:
            self._fail(str(error), now_s)
            return
        self._client.counts.num_chunks += len(exchange.seen.chunk_s) - before
        if is_complete:
            self._exchange = self._reader = None
            if reader.can_reuse and not self.is_closed:
                self._client.idle(self)
            else:
                self.close()
            self._client.end(exchange)

    def connection_lost(self, _error: Exception | None) -> None:
        self.is_closed = True
        self._client.forget(self)
        exchange, reader = self._exchange, self._reader
        if exchange is None or reader is None:
            return
        now_s = self._client.clock()
        if exchange.is_reused and exchange.seen.status == 0 and not exchange.is_over:
            # Closed as idle while the request was on its way, as HTTP allows: it was never looked at.
            self._exchange = self._reader = None
            exchange.is_reused = False
            self._client.open_for(exchange)
            return
        try:
            reader.feed_eof(now_s)
        except BrokenResponseError as broken:
            self._fail(str(broken), now_s)
            return
        self._exchange = self._reader = None
        self._client.end(exchange)

    def _fail(self, what: str, now_s: float) -> None:
        exchange = self._exchange
        assert exchange is not None
        self._exchange = self._reader = None
        self.close()
        self._client.fail(exchange, what, now_s)

    def drop(self) -> None:
        """Hangs up in the middle of an exchange."""
        self._exchange = self._reader = None
        self.close()

    def close(self) -> None:
        if self._transport is not None and not self.is_closed:
            self.is_closed = True
            self._transport.abort()


class LoadClient:
    """Sends to one target. timeout_s: a request that is not answered by then failed.

    clock: what everything is stamped with. Not the loop's: uvloop's counts milliseconds, and stands still meanwhile.
    """

    def __init__(
        self,
        target: Target,
        on_observation: Callable[[Observation], None],
        *,
        connector: Connector | None = None,
        clock: Callable[[], float] = time.monotonic,
        timeout_s: float = 600.0,
    ) -> None:
        self.target = target
        self.counts = Counts()
        self._loop = asyncio.get_running_loop()
        self.clock = clock
        self._connector = connector or target.connect
        self._on_observation = on_observation
        self._timeout_s = timeout_s
        self._idle: dict[Connection, None] = {}
        self._in_flight: set[Exchange] = set()
        self._drained = asyncio.Event()
        self._drained.set()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def send(
        self,
        request: PlannedRequest,
        intended_s: float,
        on_end: Callable[[Observation], None],
        said: list[Message] | None = None,
    ) -> None:
        """Sends now. said: the conversation before the request. Of requests in a session, the answer is kept."""
        seen = Observation(request, intended_s, started_s=self.clock())
        exchange = Exchange(seen, self.target.write(request, said), on_end)
        self.counts.num_sent += 1
        self._in_flight.add(exchange)
        self._drained.clear()
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._loop.call_soon(self.fail, exchange, CLIENT_LIMIT, self.clock())
            return
        late_s = exchange.seen.started_s - intended_s
        exchange.timers.append(self._loop.call_later(self._timeout_s - late_s, self._time_out, exchange))
        if request.cancel_after_s is not None:
            exchange.timers.append(self._loop.call_later(request.cancel_after_s - late_s, self._cancel, exchange))
        while self._idle:
            connection, _ = self._idle.popitem()  # the one used last: the others may be closed for their age
            if not connection.is_closed:
                exchange.is_reused = True
                connection.send(exchange)
                return
        self.open_for(exchange)

    def open_for(self, exchange: Exchange) -> None:
        """Opens a connection and sends the exchange on it."""
        exchange.opening = self._loop.create_task(self._open(exchange))

    async def _open(self, exchange: Exchange) -> None:
        connection = Connection(self)
        try:
            await self._connector(lambda: connection)
        except OSError as error:
            self.fail(exchange, f"cannot connect: {type(error).__name__}", self.clock())
            return
        if exchange.is_over:  # it timed out, or was cancelled, meanwhile
            connection.close()
        else:
            connection.send(exchange)

    def idle(self, connection: Connection) -> None:
        self._idle[connection] = None

    def forget(self, connection: Connection) -> None:
        self._idle.pop(connection, None)

    def fail(self, exchange: Exchange, what: str, now_s: float) -> None:
        """Ends an exchange that brought no whole answer."""
        if not exchange.is_over:
            exchange.seen.failure = exchange.seen.failure or what
            exchange.seen.conclude(now_s)
            self.end(exchange)

    def end(self, exchange: Exchange) -> None:
        """The response is complete, or never will be."""
        if exchange.is_over:
            return
        exchange.is_over = True
        exchange.payload = b""
        for timer in exchange.timers:
            timer.cancel()
        self._in_flight.discard(exchange)
        self.counts.num_ended += 1
        self.counts.num_failed += bool(exchange.seen.failure)
        self._on_observation(exchange.seen)
        exchange.on_end(exchange.seen)
        if not self._in_flight:
            self._drained.set()

    def _time_out(self, exchange: Exchange) -> None:
        self._hang_up(exchange)
        self.fail(exchange, "timeout", self.clock())

    def _cancel(self, exchange: Exchange) -> None:
        self._hang_up(exchange)
        exchange.seen.is_cancelled = True
        exchange.seen.conclude(self.clock())
        self.end(exchange)

    def _hang_up(self, exchange: Exchange) -> None:
        if exchange.connection is not None:
            exchange.connection.drop()
        elif exchange.opening is not None:
            exchange.opening.cancel()

    async def wait_drained(self) -> None:
        """Until nothing is in flight."""
        await self._drained.wait()

    def close(self) -> None:
        """Hangs up on whatever is still open; what was in flight is not reported."""
        for exchange in list(self._in_flight):
            for timer in exchange.timers:
                timer.cancel()
            exchange.is_over = True
            self._hang_up(exchange)
        self._in_flight.clear()
        while self._idle:
            self._idle.popitem()[0].close()
