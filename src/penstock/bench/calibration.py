"""Measures the steps of an engine in this process, for the simulator. Imports torch, so it is itself imported late."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Final

from penstock.base.errors import PenstockError
from penstock.bench.step_time import FittedStepTime, StepWork, fit_step_time
from penstock.config.engine import EngineConfig
from penstock.engine.build import build_engine
from penstock.engine.core import EngineCore
from penstock.engine.executor import Executor, Runner
from penstock.messages import EngineReady, EngineRequest, SamplingParams, SchedulerOutput, StepResult

MIN_FRONTEND_S: Final = 0.001
_BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
_greedy = SamplingParams(temperature=0.0, ignore_eos=True)


class MeasuringRunner:
    """Passes steps on to a runner and keeps what each held and took, and the pauses between them."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.steps: list[tuple[StepWork, float]] = []
        self.pauses_s: list[float] = []
        self._ended_s = 0.0

    def execute(self, output: SchedulerOutput) -> StepResult:
        start_s = time.perf_counter()
        result = self._runner.execute(output)
        end_s = time.perf_counter()
        self.steps.append((StepWork.of(output), end_s - start_s))
        if self._ended_s:
            self.pauses_s.append(start_s - self._ended_s)
        self._ended_s = end_s
        return result


def measure_steps(
    config: EngineConfig, seconds: float, on_progress: Callable[[str, float], None]
) -> tuple[FittedStepTime, EngineReady]:
    """Loads the engine and runs batches of every size over growing contexts for about `seconds`.

    Raises what loading raises, ConfigError when too few steps were measured.
    """
    core, ready = build_engine(config, on_progress)
    try:
        measuring = _watch(core)
        source, number = random.Random(7), 0
        deadline_s = time.perf_counter() + seconds
        longest = max(2, min(1024, ready.max_model_len - 40))
        _drain(core, [_request(source, "warm", 8, 4, ready.vocab_size)])
        measuring.steps.clear()
        measuring.pauses_s.clear()
        while time.perf_counter() < deadline_s:
            batch = min(_BATCHES[number % len(_BATCHES)], ready.max_num_seqs)
            lengths = [source.randint(1, max(1, longest // source.choice((1, 4, 16)))) for _ in range(batch)]
            requests = [
                _request(source, f"{number}-{index}", length, source.randint(4, 24), ready.vocab_size)
                for index, length in enumerate(lengths)
            ]
            _drain(core, requests, deadline_s)
            number += 1
        host_s = statistics.median(measuring.pauses_s) if measuring.pauses_s else 0.0
        fitted = fit_step_time(measuring.steps, host_s, MIN_FRONTEND_S, config.model_path)
        return fitted, ready
    finally:
        core.close()


def _watch(core: EngineCore) -> MeasuringRunner:
    """Puts the measuring runner in front of the engine's own."""
    executor = core.executor
    assert isinstance(executor, Executor)
    executor.runner = measuring = MeasuringRunner(executor.runner)
    return measuring


def _request(source: random.Random, name: str, length: int, output_len: int, vocab_size: int) -> EngineRequest:
    tokens = [source.randrange(min(16, vocab_size - 1), vocab_size) for _ in range(length)]
    return EngineRequest(request_id=name, prompt_token_ids=tokens, sampling=_greedy, max_tokens=output_len)


def _drain(core: EngineCore, requests: list[EngineRequest], deadline_s: float = float("inf")) -> None:
    for request in requests:
        core.add(request)
    while core.has_work():
        for output in core.step():
            if output.error is not None:
                raise PenstockError(f"A measuring request failed: {output.error.message}")
        if time.perf_counter() > deadline_s:
            core.abort([request.request_id for request in requests])
