"""One run: takes requests from a plan in their order and sends each when it is due.

Open loop: a request is sent at its own time, whatever became of those before it. Closed loop: `concurrency` users, each
of whom sends the next when the last has ended. The turns of a session follow one another in both.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

from penstock.bench.observation import Observation
from penstock.bench.plan import Message, PlannedRequest

TICK_S: Final = 0.01
EARLY_S: Final = 1e-6  # as good as due
MIN_WAIT_S: Final = 0.001  # uvloop rounds to milliseconds; a shorter wait would spin until the moment has come
MAX_SESSIONS: Final = 200_000
AHEAD: Final = 256  # requests made before they are due: a burst would have to wait while its prompts are made


@dataclass(slots=True)
class _Session:
    """The turns to come of one conversation. is_busy: one of them is in flight or has its time fixed."""

    waiting: deque[PlannedRequest] = field(default_factory=deque)
    said: list[Message] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    is_busy: bool = False
    ended_s: float = -math.inf
    is_broken: bool = False


class LagMeter:
    """How late this client's own timers fire: what a busy client adds to every stamp it takes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.lags_s = array("d")
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_later(TICK_S, self._tick, clock() + TICK_S)

    def _tick(self, due_s: float) -> None:
        now_s = self._clock()
        self.lags_s.append(max(0.0, now_s - due_s))
        self._handle = self._loop.call_later(TICK_S, self._tick, now_s + TICK_S)

    def stop(self) -> None:
        self._handle.cancel()


class Sender(Protocol):
    """What sends a run's requests: a LoadClient, or the simulator."""

    clock: Callable[[], float]

    @property
    def num_in_flight(self) -> int: ...

    def send(
        self,
        request: PlannedRequest,
        intended_s: float,
        on_end: Callable[[Observation], None],
        said: list[Message] | None = None,
    ) -> None: ...

    async def wait_drained(self) -> None: ...


class LoadRun:
    """Runs a plan on a client. scale: stretches the plan's times (2: half as fast).

    num_skipped: later turns of conversations whose earlier turn failed; they cannot be sent as planned.
    """

    def __init__(self, client: Sender, plan: Iterable[PlannedRequest], scale: float = 1.0) -> None:
        self._client = client
        self._plan: Iterator[PlannedRequest] = iter(plan)
        self._ahead: deque[PlannedRequest] = deque()
        self._is_looking_ahead = False
        self._broken: Exception | None = None  # what the plan raised, some requests ahead
        self._scale = scale
        self._sessions: dict[str, _Session] = {}
        self._loop = asyncio.get_running_loop()
        self._clock = client.clock
        self._exhausted = asyncio.Event()
        self._num_waiting = 0
        self._error: BaseException | None = None
        self.start_s = 0.0
        self.num_skipped = 0

    async def open_loop(self) -> None:
        """Returns when all have ended. Raises what the plan raised."""
        self._ahead.extend(itertools.islice(self._plan, AHEAD))
        self.start_s = self._clock()
        self._pump()
        await self._exhausted.wait()
        if self._error is not None:
            raise self._error
        await self._drain()

    async def closed_loop(self, concurrency: int) -> None:
        """Returns when all have ended."""
        self.start_s = self._clock()
        groups = _conversations(self._plan)
        await asyncio.gather(*(self._user(groups) for _ in range(concurrency)))

    async def _user(self, groups: Iterator[list[PlannedRequest]]) -> None:
        due_s = self._clock()
        for group in groups:
            session = _Session()
            for request in group:
                if session.is_broken:
                    self.num_skipped += 1
                    continue
                if request.turn and request.think_s:
                    due_s += request.think_s * self._scale
                    await asyncio.sleep(due_s - self._clock())
                ended: asyncio.Future[Observation] = self._loop.create_future()
                said = session.said if request.extends_session else None
                self._client.send(request, due_s, ended.set_result, said)
                self._note_end(session, await ended)
                due_s = session.ended_s  # and not when this client came to it

    def _pump(self) -> None:
        """Sends everything that is due, and comes back for the next."""
        now_s = self._clock()
        try:
            while (request := self._peek()) is not None:
                due_s = self.start_s + (request.at_s or 0.0) * self._scale
                is_later_turn = request.turn > 0 and request.session in self._sessions
                if due_s > now_s + EARLY_S and not (is_later_turn and request.at_s is None):
                    self._loop.call_later(max(MIN_WAIT_S, due_s - now_s), self._pump)
                    self._look_ahead()
                    return
                self._ahead.popleft()
                self._release(request, due_s)
        except Exception as error:  # a plan that is read from a file can be malformed anywhere
            self._error = error
        self._exhausted.set()

    def _peek(self) -> PlannedRequest | None:
        """The next request, which stays where it is. Raises what the plan raised."""
        if not self._ahead:
            if self._broken is not None:
                raise self._broken
            self._ahead.extend(itertools.islice(self._plan, 1))
        return self._ahead[0] if self._ahead else None

    def _look_ahead(self) -> None:
        """Makes the next requests one at a time, between whatever else there is to do."""
        if len(self._ahead) < AHEAD and not self._is_looking_ahead:
            self._is_looking_ahead = True
            self._loop.call_soon(self._make_one)

    def _make_one(self) -> None:
        self._is_looking_ahead = False
        try:
            request = next(self._plan, None)
        except Exception as error:  # it is told when the run comes to that place
            self._broken = error
            return
        if request is not None:
            self._ahead.append(request)
            self._look_ahead()

    def _release(self, request: PlannedRequest, due_s: float) -> None:
        if not request.session:
            self._client.send(request, due_s, _ignore)
            return
        session = self._sessions.get(request.session)
        if session is None:
            self._forget_old_sessions()
            session = self._sessions[request.session] = _Session()
        session.waiting.append(request)
        self._num_waiting += 1
        if not session.is_busy:
            self._send_turn(session)

    def _send_turn(self, session: _Session) -> None:
        """Gives the next turn of an idle session its time."""
        while session.waiting and session.is_broken and session.waiting[0].extends_session:
            session.waiting.popleft()
            self._num_waiting -= 1
            self.num_skipped += 1
        if not session.waiting:
            return
        request = session.waiting.popleft()
        due_s = self.start_s + (request.at_s or 0.0) * self._scale
        if session.ended_s > -math.inf:
            due_s = max(due_s, session.ended_s)
            if request.think_s is not None:
                due_s = session.ended_s + request.think_s * self._scale
        session.is_busy = True
        wait_s = due_s - self._clock()
        if wait_s <= EARLY_S:
            self._send_now(session, request, due_s)
        else:
            self._loop.call_later(max(MIN_WAIT_S, wait_s), self._send_now, session, request, due_s)

    def _send_now(self, session: _Session, request: PlannedRequest, due_s: float) -> None:
        self._num_waiting -= 1
        said = session.said if request.extends_session else None
        if request.answer_span is not None and session.answer:
            _put_answer(request, session.answer)
        self._client.send(request, due_s, lambda seen: self._turn_ended(session, seen), said)

    def _turn_ended(self, session: _Session, seen: Observation) -> None:
        session.is_busy = False
        self._note_end(session, seen)
        if not session.waiting:
            self._take_next_turn(session, seen.request.session)
        self._send_turn(session)

    def _take_next_turn(self, session: _Session, name: str) -> None:
        """Finds the next turn among the requests made ahead: where this server answers sooner than the recorded one, it
        is due before its place in the file."""
        for index, request in enumerate(self._ahead):
            if request.session == name:
                if request.think_s is not None:
                    del self._ahead[index]
                    session.waiting.append(request)
                    self._num_waiting += 1
                return

    def _note_end(self, session: _Session, seen: Observation) -> None:
        session.ended_s = seen.ended_s
        session.answer, seen.token_ids = seen.token_ids, []
        if not seen.is_success:
            session.is_broken = True
        elif seen.request.extends_session:
            session.said += [*cast(list[Message], seen.request.prompt), {"role": "assistant", "content": seen.text}]
        seen.text = ""

    def _forget_old_sessions(self) -> None:
        """Keeps a long replay's memory bounded: conversations that rest longest are forgotten first."""
        if len(self._sessions) < MAX_SESSIONS:
            return
        resting = [name for name, session in self._sessions.items() if not session.is_busy and not session.waiting]
        for name in resting[: MAX_SESSIONS // 2]:
            del self._sessions[name]

    async def _drain(self) -> None:
        while self._num_waiting or self._client.num_in_flight:
            await self._client.wait_drained()
            if self._num_waiting:
                await asyncio.sleep(TICK_S)


def _put_answer(request: PlannedRequest, answer: list[int]) -> None:
    """The answer that the server really gave, where the plan has a made-up one of the same length."""
    assert request.answer_span is not None
    tokens = cast(list[int], request.prompt)
    start, end = request.answer_span
    length = min(end - start, len(answer))
    tokens[start : start + length] = answer[:length]


def _ignore(_: Observation) -> None:
    """A request of no session: nothing follows from its end."""


def _conversations(plan: Iterable[PlannedRequest]) -> Iterator[list[PlannedRequest]]:
    """Consecutive requests of one session together."""
    group: list[PlannedRequest] = []
    for request in plan:
        if group and not (request.session and request.session == group[0].session):
            yield group
            group = []
        group.append(request)
    if group:
        yield group


@dataclass(slots=True, repr=False)  # asyncio.Runner takes the repr of what it returns: of every request
class RunRecord:
    """A finished run: all that was observed, and how the client itself fared. Times on the run's clock."""

    observations: list[Observation]
    start_s: float
    end_s: float
    loop_lags_s: array[float]
    client_cpu_s: float = 0.0
    num_skipped: int = 0
    # (seconds since the start, {metric: value}) of the server's own metrics, if it has any
    server_samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)
