"""EngineCore: the spine. Receive, schedule, launch, update, send."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from penstock.base.errors import PenstockError, ValidationError
from penstock.engine.executor import StepExecutor, StepHandle
from penstock.engine.grammar_gate import GrammarGate
from penstock.messages import (
    EngineRequest,
    EngineStats,
    ErrorInfo,
    FinishReason,
    RequestOutput,
    RequestTimings,
    SchedulerOutput,
    Vocabulary,
)
from penstock.scheduler import Scheduler
from penstock.structured import GrammarCompiler

logger = logging.getLogger(__name__)

# With nothing to run but grammars in the making, a step waits for one of them so long.
GRAMMAR_WAIT_S = 0.002


class InFlight(NamedTuple):
    """A step that was launched and whose result has not been taken yet."""

    output: SchedulerOutput
    handle: StepHandle


class EngineCore:
    """One engine: a scheduler that decides and an executor that does, one step apart.

    Step N + 1 is scheduled and launched before the result of step N is taken, so the device never waits for Python.
    Not thread-safe: one thread calls `add`, `abort` and `step`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: StepExecutor,
        clock: Callable[[], float] = time.monotonic,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self._gate = GrammarGate(grammars or GrammarCompiler())
        self._clock = clock
        self._in_flight: InFlight | None = None
        self._num_checks = 0
        self._num_violations = 0

    @property
    def has_vocabulary(self) -> bool:
        return self._gate.compiler.is_started

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Tells the engine its tokens, without which no output can be constrained. A second call changes nothing."""
        self._gate.compiler.start(vocabulary)

    def add(self, request: EngineRequest) -> RequestOutput | None:
        """Admits a request, or returns the final output that says why not."""
        now = self._clock()
        try:
            if request.request_id in self._gate:
                raise ValidationError("A request with this id is in progress.", param="request_id")
            if self._gate.passes(request):
                self.scheduler.add(request, now)
        except PenstockError as error:
            return _refusal(request, error, now)
        return None

    def abort(
        self, request_ids: Sequence[str], finish_reason: FinishReason = FinishReason.ABORT
    ) -> list[RequestOutput]:
        """Ends requests now; their blocks are free when this returns."""
        now = self._clock()
        return self._gate.abort(request_ids, finish_reason, now) + self.scheduler.abort(request_ids, finish_reason, now)

    def step(self) -> list[RequestOutput]:
        """Schedules and launches one step, then takes the result of the one before it."""
        done = self._admit_parked() if self._gate else []
        output = self.scheduler.schedule(self._clock())
        launched = InFlight(output, self.executor.launch(output)) if output is not None else None
        if launched is None and self._in_flight is None and not done and self._gate:
            self._gate.wait(GRAMMAR_WAIT_S)
        if self._in_flight is not None:
            result = self._in_flight.handle.result()
            done += self.scheduler.update(self._in_flight.output, result, self._clock())
        self._in_flight = launched
        done += self.scheduler.take_finished()
        return done

    def has_work(self) -> bool:
        return self._in_flight is not None or self.scheduler.has_work() or bool(self._gate)

    def prepare(self) -> bool:
        """While there is no work: does one piece of what makes later steps faster. False: nothing is left."""
        return self.executor.prepare()

    def stats(self) -> EngineStats:
        stats = self.scheduler.stats()
        stats.step_started_s = self.executor.step_started_s
        stats.captures = self.executor.captures
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
        """Waits for the step in flight, stops the executor's thread and what compiles grammars."""
        self.executor.close()
        self._gate.compiler.close()

    def _admit_parked(self) -> list[RequestOutput]:
        """Hands on requests whose grammars are ready; the final outputs of those that are refused."""
        now = self._clock()
        ready, refused = self._gate.take_ready(now)
        for request in ready:
            try:
                self.scheduler.add(request, now)
            except PenstockError as error:
                refused.append((request, error))
        return [_refusal(request, error, now) for request, error in refused]


def _refusal(request: EngineRequest, error: PenstockError, now: float) -> RequestOutput:
    return RequestOutput(
        request.request_id,
        finish_reason=FinishReason.ERROR,
        error=ErrorInfo.of(error),
        num_prompt_tokens=len(request.prompt_token_ids),
        timings=RequestTimings(arrival_s=request.arrival_s, finished_s=now),
    )
