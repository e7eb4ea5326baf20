"""From an EngineConfig to a running EngineCore: plan the memory, load the model, wire the parts."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import torch

from penstock.base.errors import MemoryPlanError
from penstock.config.engine import EngineConfig
from penstock.config.resolve import watermark_blocks
from penstock.engine.core import EngineCore
from penstock.engine.executor import Executor, StepExecutor, StreamExecutor
from penstock.engine.step_log import StepLoggingRunner
from penstock.kvcache import KVCacheManager
from penstock.messages import EngineReady
from penstock.runner import MemoryPlan, ModelRunner, plan_memory, plan_profiled
from penstock.runner.profile import PROBE_BLOCKS, run_largest_steps
from penstock.scheduler import Scheduler
from penstock.structured import GrammarCompiler


class StartupPhases:
    """Names and durations of the start-up phases, in order; every second since `started_s` belongs to one."""

    def __init__(self, on_progress: Callable[[str, float], None]) -> None:
        self.finished: list[tuple[str, float]] = []
        self._on_progress = on_progress
        self._phase = ""
        self._since_s = time.perf_counter()

    def begin(self, phase: str) -> None:
        self.end()
        self._phase = phase
        self._on_progress(phase, 0.0)

    def progress(self, fraction: float) -> None:
        self._on_progress(self._phase, fraction)

    def end(self, last_part: tuple[str, float] | None = None) -> None:
        """last_part: a name of its own for so many seconds of the current phase."""
        now = time.perf_counter()
        if self._phase:
            part_s = last_part[1] if last_part else 0.0
            self.finished.append((self._phase, now - self._since_s - part_s))
            if last_part:
                self.finished.append(last_part)
            self._phase = ""
        self._since_s = now


def build_engine(config: EngineConfig, on_progress: Callable[[str, float], None]) -> tuple[EngineCore, EngineReady]:
    """Builds an engine. on_progress(phase, fraction) is called as it goes.

    Raises: MemoryPlanError and ConfigError before any weight is read; CheckpointError for a checkpoint that cannot be
    served.
    """
    phases = StartupPhases(on_progress)
    phases.begin("plan memory")
    asked, plan = config, plan_memory(config)
    config = apply_plan(asked, plan)
    is_profiled = plan.free_bytes > 0 and asked.cache.num_blocks == 0 and not config.model.is_encoder
    phases.begin("load weights")
    grammars = GrammarCompiler()
    first = _probing(config) if is_profiled else config
    runner = ModelRunner(first, lambda _phase, fraction: phases.progress(fraction), grammars)
    phases.end(("repack weights", runner.packing_s))
    if is_profiled:
        phases.begin("run the largest step")
        plan = profile(runner, asked, config, plan)
        config = apply_plan(asked, plan)
        runner.replace_pool(config.model, config.cache)
    phases.begin("start scheduler")
    scheduler = Scheduler(config.scheduler, KVCacheManager(config.cache))
    core = EngineCore(scheduler, _executor(runner, config), grammars=grammars)
    phases.end()
    ready = EngineReady(
        max_model_len=config.scheduler.max_model_len,
        vocab_size=config.model.vocab_size,
        block_size=config.cache.block_size,
        num_blocks=config.cache.num_blocks,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        dtype=config.dtype,
        instruction_set=runner.ops.isa or runner.ops.kind,
        phases=phases.finished,
        memory_table=plan.table,
        weights_table=runner.weights_table,
        tasks=config.model.tasks,
        embedding_size=config.model.hidden_size,
        labels=config.model.pooler.labels,
    )
    return core, ready


def _probing(config: EngineConfig) -> EngineConfig:
    """With the pool that the largest step is run in before the KV cache is made."""
    cache = msgspec.structs.replace(config.cache, num_blocks=PROBE_BLOCKS, num_host_blocks=0)
    return msgspec.structs.replace(config, cache=cache)


def profile(runner: ModelRunner, asked: EngineConfig, config: EngineConfig, plan: MemoryPlan) -> MemoryPlan:
    """The plan with what the largest step really takes. asked: the configuration without what a plan decided.

    Raises MemoryPlanError: not even the step fits.
    """
    try:
        run_largest_steps(runner, config, runner.ops.layouts.device)
    except torch.OutOfMemoryError as error:
        raise MemoryPlanError(
            "The device has no room for the largest step.",
            remedy="Give a smaller --max-num-batched-tokens or --max-num-seqs.",
            param="max_num_batched_tokens",
        ) from error
    return plan_profiled(asked, plan, plan.free_bytes - runner.free_bytes())


def _executor(runner: ModelRunner, config: EngineConfig) -> StepExecutor:
    """Runs steps where the device does, and logs them where that was asked for."""
    if not config.step_log:
        return StreamExecutor(runner) if runner.is_asynchronous else Executor(runner)
    logged = StepLoggingRunner(runner, config)
    return StreamExecutor(logged) if runner.is_asynchronous else Executor(logged)


def apply_plan(config: EngineConfig, plan: MemoryPlan) -> EngineConfig:
    """The configuration with what the memory plan decided (pool size, watermark, context length), and with what the
    model means for the scheduler."""
    model = config.model
    num_blocks = 0 if model.is_encoder else config.cache.num_blocks or plan.num_blocks
    is_caching = config.cache.enable_prefix_caching and not model.is_encoder
    return msgspec.structs.replace(
        config,
        cache=msgspec.structs.replace(
            config.cache,
            num_blocks=num_blocks,
            num_host_blocks=plan.num_host_blocks if is_caching else 0,
            enable_prefix_caching=is_caching,
        ),
        scheduler=msgspec.structs.replace(
            config.scheduler,
            max_model_len=plan.max_model_len,
            watermark_blocks=0 if model.is_encoder else watermark_blocks(num_blocks),
            is_encoder=model.is_encoder,
            pools_every_token=model.pooler.pooling != "last",
        ),
    )
