"""Runs steps one after another on a thread of their own, so that the next can be scheduled meanwhile."""

from __future__ import annotations

import queue
import threading
import time
from typing import Protocol

from penstock.messages import ErrorInfo, SchedulerOutput, StepResult


class Runner(Protocol):
    """What executes a step (runner.ModelRunner, or a fake in tests)."""

    def execute(self, output: SchedulerOutput) -> StepResult: ...


class StepHandle:
    """A step that was launched. `result()` waits for it."""

    __slots__ = ("_done", "_result")

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self._result: StepResult | None = None

    def set(self, result: StepResult) -> None:
        self._result = result
        self._done.release()

    def result(self) -> StepResult:
        self._done.acquire()
        self._done.release()
        assert self._result is not None
        return self._result


class StepExecutor(Protocol):
    """What an engine launches steps on: an Executor, or the simulator's."""

    step_started_s: float

    def launch(self, output: SchedulerOutput) -> StepHandle: ...

    def close(self) -> None: ...


class Executor:
    """Executes plans strictly in launch order.

    That order is what makes it safe to free and reuse a block while a step that still writes to it is in flight:
    the new owner's writes come later. `launch` never blocks; `close` waits for what was launched.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._plans: queue.SimpleQueue[tuple[SchedulerOutput, StepHandle] | None] = queue.SimpleQueue()
        self.step_started_s = 0.0
        self._thread = threading.Thread(target=self._run, name="penstock-executor", daemon=True)
        self._thread.start()

    def launch(self, output: SchedulerOutput) -> StepHandle:
        handle = StepHandle()
        self._plans.put((output, handle))
        return handle

    def close(self) -> None:
        self._plans.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (plan := self._plans.get()) is not None:
            output, handle = plan
            self.step_started_s = time.monotonic()
            handle.set(self._execute(output))
            self.step_started_s = 0.0

    def _execute(self, output: SchedulerOutput) -> StepResult:
        """The runner isolates a guilty request itself; what still escapes ends the requests of this step only."""
        start_s = time.perf_counter()
        try:
            return self.runner.execute(output)
        except Exception as error:
            info = ErrorInfo.of(error)
            errors = {request.request_id: info for request in output.scheduled}
            return StepResult(output.step_id, {}, {}, errors, time.perf_counter() - start_s)
