"""What each step held and took, written to a file: what a simulator of this engine is fitted to.

Owns: the file that is being written.
"""

from __future__ import annotations

import os
import time
from operator import attrgetter
from pathlib import Path
from typing import Final, Generic, Protocol

import msgspec

from penstock.base.errors import ConfigError
from penstock.config.engine import EngineConfig
from penstock.engine.executor import AsyncRunner, Launched, Runner
from penstock.messages import CaptureStats, SchedulerOutput, StepResult

STEP_LOG_FORMAT: Final = "penstock-steps"
FLUSH_S: Final = 1.0
_num_computed_tokens = attrgetter("num_computed_tokens")
_samples = attrgetter("samples")


class StepLogHeader(msgspec.Struct, kw_only=True):
    """The first line. What the steps were taken with, as far as a simulation needs to know it."""

    format: str = STEP_LOG_FORMAT
    version: int = 1
    model: str = ""
    quantization: str = ""
    num_blocks: int
    block_size: int
    max_model_len: int


class StepWork(msgspec.Struct, frozen=True, array_like=True):
    """What a step computes. num_tokens: rows of the linear layers. num_sampled: rows of the head.

    decode_context: keys read by rows of one token, summed. prefill_pairs: (query, key) pairs of longer chunks, summed.
    """

    num_tokens: int
    num_sampled: int
    decode_context: int
    prefill_pairs: int

    @classmethod
    def of(cls, output: SchedulerOutput) -> StepWork:
        scheduled = output.scheduled
        if output.num_tokens == len(scheduled):  # a token each
            context = sum(map(_num_computed_tokens, scheduled)) + len(scheduled)
            return cls(output.num_tokens, sum(map(_samples, scheduled)), context, 0)
        num_sampled = decode_context = prefill_pairs = 0
        for share in scheduled:
            num_sampled += share.samples
            if share.num_tokens == 1:
                decode_context += share.num_computed_tokens + 1
            else:
                # Query i of the chunk sees num_computed_tokens + i + 1 keys.
                prefill_pairs += share.num_tokens * share.num_computed_tokens
                prefill_pairs += share.num_tokens * (share.num_tokens + 1) // 2
        return cls(output.num_tokens, num_sampled, decode_context, prefill_pairs)


class LoggedStep(msgspec.Struct, frozen=True, array_like=True):
    """One line of the file. started_s: of the machine's monotonic clock. seconds: of the step alone."""

    started_s: float
    seconds: float
    work: StepWork


class StepRunner(Runner, AsyncRunner[Launched], Protocol[Launched]):
    """What executes steps, or launches them on a device (runner.ModelRunner)."""


class StepLoggingRunner(Generic[Launched]):
    """Passes steps on to a runner and writes what each held and took.

    Raises ConfigError when the file cannot be made.
    """

    def __init__(self, runner: StepRunner[Launched], config: EngineConfig) -> None:
        self._runner = runner
        self._encoder = msgspec.json.Encoder()
        name = time.strftime("steps-%Y%m%dT%H%M%S", time.gmtime())
        self.path = Path(config.step_log) / f"{name}-{os.getpid()}.jsonl"
        header = StepLogHeader(
            model=config.model_path, quantization=config.quantization or "", num_blocks=config.cache.num_blocks,
            block_size=config.cache.block_size, max_model_len=config.scheduler.max_model_len,
        )  # fmt: skip
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb")
        except OSError as error:
            raise ConfigError(
                f"Steps cannot be recorded in {config.step_log}: {error.strerror}.", remedy="Name a writable directory."
            ) from None
        self._file.write(self._encoder.encode(header) + b"\n")
        self._file.flush()
        self._flushed_s = 0.0

    def execute(self, output: SchedulerOutput) -> StepResult:
        work = StepWork.of(output)
        started_s = time.monotonic()
        result = self._runner.execute(output)
        self._write(LoggedStep(started_s, time.monotonic() - started_s, work))
        return result

    def launch(self, output: SchedulerOutput) -> tuple[Launched, StepWork]:
        return self._runner.launch(output), StepWork.of(output)

    def finish(self, step: tuple[Launched, StepWork]) -> StepResult:
        launched, work = step
        result = self._runner.finish(launched)
        self._write(LoggedStep(time.monotonic() - result.seconds, result.seconds, work))
        return result

    def prepare(self) -> bool:
        return self._runner.prepare()

    def close(self) -> None:
        self._runner.close()

    @property
    def captures(self) -> CaptureStats:
        return self._runner.captures

    def _write(self, step: LoggedStep) -> None:
        self._file.write(self._encoder.encode(step) + b"\n")
        now_s = time.monotonic()
        if now_s - self._flushed_s > FLUSH_S:
            self._file.flush()
            self._flushed_s = now_s
