"""EngineCore: the spine. Receive, schedule, launch, update, send."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.base.errors import PenstockError
from penstock.engine.executor import StepExecutor, StepHandle
from penstock.messages import (
    EngineRequest,
    EngineStats,
    ErrorInfo,
    FinishReason,
    RequestOutput,
    RequestTimings,
    SchedulerOutput,
)
from penstock.scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class InFlight:
    """A step that was launched and whose result has not been taken yet."""

    output: SchedulerOutput
    handle: StepHandle


class EngineCore:
    """One engine: a scheduler that decides and an executor that does, one step apart.

    Step N + 1 is scheduled and launched before the result of step N is taken, so the device never waits for Python.
    Not thread-safe: one thread calls `add`, `abort` and `step`.
    """

    def __init__(
        self, scheduler: Scheduler, executor: StepExecutor, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self._clock = clock
        self._in_flight: InFlight | None = None
        self._num_checks = 0
        self._num_violations = 0

    def add(self, request: EngineRequest) -> RequestOutput | None:
        """Admits a request, or returns the final output that says why not."""
        now = self._clock()
        try:
            self.scheduler.add(request, now)
        except PenstockError as error:
            return _refusal(request, error, now)
        return None

    def abort(
        self, request_ids: Sequence[str], finish_reason: FinishReason = FinishReason.ABORT
    ) -> list[RequestOutput]:
        """Ends requests now; their blocks are free when this returns."""
        return self.scheduler.abort(request_ids, finish_reason, self._clock())

    def step(self) -> list[RequestOutput]:
        """Schedules and launches one step, then takes the result of the one before it."""
        output = self.scheduler.schedule(self._clock())
        launched = InFlight(output, self.executor.launch(output)) if output is not None else None
        done: list[RequestOutput] = []
        if self._in_flight is not None:
            result = self._in_flight.handle.result()
            done = self.scheduler.update(self._in_flight.output, result, self._clock())
        self._in_flight = launched
        done += self.scheduler.take_finished()
        return done

    def has_work(self) -> bool:
        return self._in_flight is not None or self.scheduler.has_work()

    def stats(self) -> EngineStats:
        stats = self.scheduler.stats()
        stats.step_started_s = self.executor.step_started_s
        stats.num_invariant_checks = self._num_checks
        stats.num_invariant_violations = self._num_violations
        return stats

    def check(self) -> None:
        """Checks every invariant of scheduler and cache; a violation is logged and counted, and serving goes on."""
        self._num_checks += 1
        try:
            self.scheduler.check()
        except AssertionError:
            self._num_violations += 1
            logger.exception("An invariant of the scheduler or the KV cache does not hold")

    def close(self) -> None:
        """Waits for the step in flight and stops the executor's thread."""
        self.executor.close()


def _refusal(request: EngineRequest, error: PenstockError, now: float) -> RequestOutput:
    return RequestOutput(
        request.request_id,
        finish_reason=FinishReason.ERROR,
        error=ErrorInfo.of(error),
        num_prompt_tokens=len(request.prompt_token_ids),
        timings=RequestTimings(arrival_s=request.arrival_s, finished_s=now),
    )
