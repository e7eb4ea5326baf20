"""What one server knows: its parts, its phase, and every request that is open.

Owns: the table of open requests, the phase.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import psutil

from penstock.base.errors import DeadlineExceededError, DrainingError, PenstockError, UnknownModelError, ValidationError
from penstock.config.settings import Settings
from penstock.messages import EngineInput, EngineReady, EngineRequest, EngineStats, FinishReason, RequestOutput
from penstock.observability.logs import LogSink
from penstock.observability.metrics import ServerInfo, ServerMetrics, Snapshot
from penstock.observability.traffic import TrafficRecorder
from penstock.observability.usage import UsageLog
from penstock.server.exchange import Exchange
from penstock.server.health import Signs, Verdict, Watchdog
from penstock.server.model_facts import ModelFacts
from penstock.server.text import TextLayer

logger = logging.getLogger(__name__)

SWEEP_S = 1.0
# The engine ends a request at its deadline; only when it does not, the server does, this much later.
DEADLINE_GRACE_S = 5.0


class OutputStream(Protocol):
    """What frontend.RequestStream is to the server."""

    def __aiter__(self) -> OutputStream: ...

    async def __anext__(self) -> RequestOutput: ...


class Engine(Protocol):
    """What frontend.EngineClient is to the server."""

    stats: EngineStats
    last_message_s: float

    @property
    def ready(self) -> EngineReady: ...

    @property
    def pid(self) -> int: ...

    @property
    def is_alive(self) -> bool: ...

    def seconds_since_progress(self, now: float) -> float: ...

    def submit(self, request: EngineRequest) -> OutputStream: ...

    def abort(self, request_ids: list[str], finish_reason: FinishReason = FinishReason.ABORT) -> None: ...

    def send(self, message: EngineInput) -> None: ...

    async def shutdown(self, drain_s: float) -> None: ...


class Phase(enum.Enum):
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class LoadingError(PenstockError):
    """The server listens, but its engine is not ready yet."""

    code = "loading"
    status = 503


class CutOffError(PenstockError):
    """A client that neither sends nor reads is cut off."""

    code = "client_timeout"
    status = 408


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request between its arrival and its usage record. cut: why the sweeper cancelled its task."""

    exchange: Exchange
    task: asyncio.Task[None] | None
    deadline_s: float | None = None
    cut: PenstockError | None = None


@dataclass
class ServerState:
    """The server's parts. `engine` and `text` are set by `serve` when the engine is ready."""

    settings: Settings
    model_names: Sequence[str]
    info: ServerInfo
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    log_sink: LogSink | None = None
    created_s: int = field(default_factory=lambda: int(time.time()))
    phase: Phase = Phase.LOADING
    engine: Engine | None = None
    text: TextLayer | None = None
    system_fingerprint: str = ""
    facts: ModelFacts = field(default_factory=ModelFacts)
    recorder: TrafficRecorder | None = None

    def __post_init__(self) -> None:
        self.usage = UsageLog(self.metrics)
        self.watchdog = Watchdog(self.settings.stall_timeout)
        self._open: set[OpenRequest] = set()
        self._emptied = asyncio.Event()
        self._emptied.set()
        self.engine_died = asyncio.Event()
        self.when_closing: list[Callable[[], None]] = []  # called when nothing is served any more
        self.when_serving: list[Callable[[], None]] = []  # called each time an engine has become ready
        self._id_prefix = secrets.token_hex(6)
        self._next_id = 0

    def serve(self, engine: Engine, text: TextLayer) -> None:
        """Starts taking requests."""
        self.engine, self.text = engine, text
        self.engine_died.clear()
        if self.phase is Phase.LOADING:
            self.phase = Phase.SERVING
        self.observe_engine()
        for begin in self.when_serving:
            begin()

    def lose_engine(self) -> None:
        """Goes back to loading: the engine died, and another is being started."""
        self.engine = self.text = None
        if self.phase is Phase.SERVING:
            self.phase = Phase.LOADING

    def close(self) -> None:
        """Nothing is served any more."""
        for end in self.when_closing:
            end()

    def drain(self) -> None:
        """Takes no more requests; those that are open go on."""
        self.phase = Phase.DRAINING

    @property
    def num_open(self) -> int:
        return len(self._open)

    async def wait_until_empty(self, timeout_s: float) -> bool:
        """Waits for the open requests to end; whether they did."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._emptied.wait(), timeout_s)
        return not self._open

    def now_s(self) -> float:
        """Wall-clock seconds since 1970, for `created` fields."""
        return time.time()

    def new_id(self) -> str:
        """An id that no other request of this process has had, and hardly one of another."""
        self._next_id += 1
        return f"{self._id_prefix}{self._next_id:08x}"

    def open_request(self, exchange: Exchange) -> OpenRequest:
        request = OpenRequest(exchange, asyncio.current_task())
        self._open.add(request)
        self._emptied.clear()
        return request

    def close_request(self, request: OpenRequest) -> None:
        self._open.discard(request)
        if not self._open:
            self._emptied.set()

    def parts(self) -> tuple[Engine, TextLayer]:
        """The engine and the text layer, for a new request. Raises DrainingError, LoadingError."""
        if self.phase is Phase.DRAINING:
            raise DrainingError("The server is shutting down.", remedy="Send the request to another replica.")
        if self.engine is None or self.text is None:
            raise LoadingError("The model is still loading.", remedy="Retry when /health/ready answers 200.")
        return self.engine, self.text

    def check_priority(self, priority: int | None) -> None:
        """Refuses a priority that this server would ignore."""
        if priority and self.settings.scheduling_policy != "priority":
            raise ValidationError(
                "priority has no effect on this server.",
                remedy="Leave it out, or serve with --scheduling-policy priority.",
                param="priority",
            )

    def check_model(self, name: str) -> None:
        if name not in self.model_names:
            known = ", ".join(self.model_names)
            raise UnknownModelError(
                f"There is no model {name[:200]!r} here.", remedy=f"Served: {known}.", param="model"
            )

    def named_model(self, name: str | None) -> str:
        """The model that a request means; the first where it names none. Raises UnknownModelError."""
        if name is None:
            return self.model_names[0]
        self.check_model(name)
        return name

    def readiness(self) -> Verdict:
        """Whether a request sent now would be served."""
        if self.phase is not Phase.SERVING:
            return Verdict(False, self.phase.value)
        return self.watchdog.verdict

    def observe_engine(self) -> Verdict:
        assert self.engine is not None
        now = time.monotonic()
        if not self.engine.is_alive:
            self.engine_died.set()
        return self.watchdog.observe(
            Signs(
                now_s=now,
                is_alive=self.engine.is_alive,
                last_message_s=self.engine.last_message_s,
                stalled_s=self.engine.seconds_since_progress(now),
                cpu_s=_cpu_seconds(self.engine.pid),
            )
        )

    def snapshot(self) -> Snapshot:
        return Snapshot(
            stats=self.engine.stats if self.engine is not None else EngineStats(),
            info=self.info,
            is_ready=self.readiness().is_ok,
            num_open=self.num_open,
            num_log_lines_dropped=self.log_sink.num_dropped if self.log_sink is not None else 0,
        )

    async def sweep_forever(self) -> None:
        """Once a second: looks at the engine, and cuts off clients and requests that have outlived their time."""
        while True:
            await asyncio.sleep(SWEEP_S)
            if self.engine is not None:
                before = self.watchdog.verdict
                verdict = self.observe_engine()
                if verdict.is_ok != before.is_ok:
                    logger.warning("engine: %s", verdict.reason)
            self.sweep(asyncio.get_running_loop().time(), time.monotonic())

    def sweep(self, loop_s: float, now_s: float) -> None:
        """loop_s: event-loop time, now_s: monotonic time (the same clock in practice, not by contract)."""
        for request in list(self._open):
            waiting_since_s = request.exchange.waiting_since_s
            if waiting_since_s is not None and loop_s - waiting_since_s > self.settings.client_timeout:
                _cut(request, CutOffError("The client neither sent nor read in time."))
            elif request.deadline_s is not None and now_s > request.deadline_s + DEADLINE_GRACE_S:
                _cut(
                    request,
                    DeadlineExceededError("The request's time was over.", remedy="Ask for less, or wait longer."),
                )


def _cut(request: OpenRequest, reason: PenstockError) -> None:
    # A request that was cut for its deadline may hang once more while the client does not read the error.
    if request.cut is None or (isinstance(reason, CutOffError) and not isinstance(request.cut, CutOffError)):
        request.cut = reason
        assert request.task is not None
        request.task.cancel()


def _cpu_seconds(pid: int) -> float | None:
    """Processor seconds a process has used, None when that cannot be read."""
    if pid == os.getpid():  # an engine inside this process says nothing by its processor time
        return None
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)
