"""Runs steps one after another beside the engine's loop, so that the next can be scheduled meanwhile: on a thread of
their own where the runner computes on the CPU, on the device where that works by itself.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Generic, Protocol, TypeVar

from penstock.base.errors import DeviceLostError
from penstock.messages import CaptureStats, ErrorInfo, SchedulerOutput, StepResult

Launched = TypeVar("Launched")


class Runner(Protocol):
    """What executes a step (runner.ModelRunner, or a fake in tests)."""

    def execute(self, output: SchedulerOutput) -> StepResult: ...


class AsyncRunner(Protocol[Launched]):
    """What gives a step to a device and returns at once (runner.ModelRunner on a GPU)."""

    def launch(self, output: SchedulerOutput) -> Launched: ...

    def finish(self, step: Launched) -> StepResult: ...

    def prepare(self) -> bool: ...

    def close(self) -> None: ...

    @property
    def captures(self) -> CaptureStats: ...


class StepHandle(Protocol):
    """A step that was launched. `result()` waits for it."""

    def result(self) -> StepResult: ...


class ThreadHandle:
    """A step on the executor's thread."""

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

    @property
    def captures(self) -> CaptureStats: ...

    def launch(self, output: SchedulerOutput) -> StepHandle: ...

    def prepare(self) -> bool:
        """A piece of work that no step waits for. False: there is none."""
        ...

    def close(self) -> None: ...


class StreamExecutor(Generic[Launched]):
    """Launches steps on a device from the engine's own thread; who asks for a result waits for the device.

    Both raise DeviceLostError: then no step will ever succeed again.
    """

    def __init__(self, runner: AsyncRunner[Launched]) -> None:
        self.runner = runner
        self.step_started_s = 0.0
        self.num_unfinished = 0

    def launch(self, output: SchedulerOutput) -> StreamHandle[Launched]:
        self.num_unfinished += 1
        self.step_started_s = self.step_started_s or time.monotonic()
        start_s = time.perf_counter()
        try:
            return StreamHandle(self, output, self.runner.launch(output))
        except DeviceLostError:
            raise
        except Exception as error:
            return StreamHandle(self, output, None, _failed(output, error, start_s))

    def prepare(self) -> bool:
        return self.runner.prepare()

    @property
    def captures(self) -> CaptureStats:
        return self.runner.captures

    def close(self) -> None:
        self.runner.close()


class StreamHandle(Generic[Launched]):
    """A step on the device; with an outcome already where it could not be launched."""

    __slots__ = ("_executor", "_launched", "_outcome", "_output")

    def __init__(
        self,
        executor: StreamExecutor[Launched],
        output: SchedulerOutput,
        launched: Launched | None,
        outcome: StepResult | None = None,
    ) -> None:
        self._executor = executor
        self._output = output
        self._launched = launched
        self._outcome = outcome

    def result(self) -> StepResult:
        executor, start_s = self._executor, time.perf_counter()
        outcome = self._outcome
        if outcome is None:
            assert self._launched is not None
            try:
                outcome = executor.runner.finish(self._launched)
            except DeviceLostError:
                raise
            except Exception as error:
                outcome = _failed(self._output, error, start_s)
        executor.num_unfinished -= 1
        executor.step_started_s = time.monotonic() if executor.num_unfinished else 0.0
        return outcome


class Executor:
    """Executes plans strictly in launch order.

    That order is what makes it safe to free and reuse a block while a step that still writes to it is in flight:
    the new owner's writes come later. `launch` never blocks; `close` waits for what was launched.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._plans: queue.SimpleQueue[tuple[SchedulerOutput, ThreadHandle] | None] = queue.SimpleQueue()
        self.step_started_s = 0.0
        self.captures = CaptureStats()
        self._thread = threading.Thread(target=self._run, name="penstock-executor", daemon=True)
        self._thread.start()

    def launch(self, output: SchedulerOutput) -> ThreadHandle:
        handle = ThreadHandle()
        self._plans.put((output, handle))
        return handle

    def prepare(self) -> bool:
        return False

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
            return _failed(output, error, start_s)


def _failed(output: SchedulerOutput, error: Exception, start_s: float) -> StepResult:
    info = ErrorInfo.of(error)
    errors = {request.request_id: info for request in output.scheduled}
    return StepResult(output.step_id, {}, {}, errors, time.perf_counter() - start_s)
