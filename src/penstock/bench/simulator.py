"""The real engine loop, scheduler and KV cache on simulated time: only a step's duration is a model.

Nothing of a policy is written here: arrivals and conversations are LoadRun's, decisions are the Scheduler's, and the
order of launching and taking results is EngineCore's.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, cast

import msgspec

from penstock.base.errors import ConfigError
from penstock.bench.host_link import HostLink
from penstock.bench.load_run import LoadRun, RunRecord
from penstock.bench.measure import Workload
from penstock.bench.observation import Observation
from penstock.bench.plan import Message, PlannedRequest
from penstock.bench.simulated_time import SimulatedLoop, simulate
from penstock.bench.step_time import Coldness, StepTime, quantile
from penstock.config.engine import CacheConfig, SchedulerConfig
from penstock.config.resolve import EngineOptions, scheduler_config, watermark_blocks, with_limits
from penstock.engine.core import EngineCore
from penstock.engine.step_log import StepWork
from penstock.kvcache import KVCacheManager
from penstock.messages import (
    CaptureStats,
    EngineRequest,
    FinishReason,
    RequestOutput,
    SampledTokens,
    SamplingParams,
    SchedulerOutput,
    StepResult,
)
from penstock.scheduler import Scheduler

SAMPLE_S: Final = 1.0
MAX_HOST_BLOCKS: Final = 1 << 24
_WORK_SHARE: Final = 0.5  # of what a request takes to the engine; the rest is waking up who sleeps
_ANSWER_TOKEN: Final = 1 << 20  # no dataset draws it: an answer is cached only for who continues it
_drawn = SampledTokens([_ANSWER_TOKEN])
_request_id = attrgetter("request_id")
_sampling = SamplingParams(temperature=0.0, ignore_eos=True)


class SimulatedHandle:
    """A step that ends at a known time; waiting for it moves the clock there."""

    __slots__ = ("_end_s", "_loop", "_outcome")

    def __init__(self, loop: SimulatedLoop, end_s: float, outcome: StepResult) -> None:
        self._loop = loop
        self._end_s = end_s
        self._outcome = outcome

    def result(self) -> StepResult:
        self._loop.simulated_s = max(self._loop.simulated_s, self._end_s)
        return self._outcome


class SimulatedExecutor:
    """Runs steps one after another, each for as long as the model says. Every draw gives the same token."""

    def __init__(self, loop: SimulatedLoop, step_time: StepTime, link: HostLink | None, seed: int) -> None:
        self._loop = loop
        self._link = link
        self._step_time = step_time
        self._source = random.Random(f"{seed} steps")
        self._coldness = Coldness()
        self._free_s = 0.0
        self.step_started_s = 0.0
        self.busy_s = 0.0
        self.num_steps = 0
        self.captures = CaptureStats()

    def launch(self, output: SchedulerOutput) -> SimulatedHandle:
        work, step_time = StepWork.of(output), self._step_time
        start_s = self._loop.simulated_s + step_time.host_s
        if self._link is not None:
            start_s = self._link.step_start(output, start_s, self._free_s)
        elif start_s < self._free_s:
            start_s = self._free_s
        seconds = step_time.draw(work, self._source.random(), self._coldness.before(start_s))
        self._coldness.work(seconds)
        self._free_s = start_s + seconds
        self.busy_s += seconds
        self.num_steps += 1
        sampled = dict.fromkeys(map(_request_id, output.scheduled), _drawn)
        return SimulatedHandle(self._loop, self._free_s, StepResult(output.step_id, sampled, {}, {}, seconds))

    def prepare(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing runs."""


class SimulatedClient:
    """Stands for the load client, the network and the server: hands requests to an engine, notes what it gives."""

    def __init__(
        self, core: EngineCore, step_time: StepTime, on_observation: Callable[[Observation], None], seed: int
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        self._loop = loop
        self.clock = loop.time
        self._core = core
        self._frontend = step_time.frontend
        self._free_s = 0.0  # from when on the front end does nothing
        self._outputs_s = 0.0  # when it was last given outputs
        self._free_before_s = 0.0  # as _free_s was then
        self._source = random.Random(f"{seed} frontend")
        self._on_observation = on_observation
        self._open: dict[str, tuple[Observation, Callable[[Observation], None]]] = {}
        self._chunks: dict[str, array[float]] = {}  # of each open request: when they came
        self._num_sent = 0
        self._num_ending = 0  # their last output is on its way to the client
        self._drained = asyncio.Event()
        self._drained.set()
        self._sampled_s = loop.time()
        self.samples: list[tuple[float, dict[str, float]]] = []

    @property
    def num_in_flight(self) -> int:
        return len(self._open) + self._num_ending

    def send(
        self,
        request: PlannedRequest,
        intended_s: float,
        on_end: Callable[[Observation], None],
        said: list[Message] | None = None,
    ) -> None:
        """Into the engine's inbox, which is read between steps."""
        self._num_sent += 1
        name = str(self._num_sent)
        seen = Observation(request, intended_s, intended_s, intended_s, status=200, is_stream=True)
        tokens = prompt_tokens(request, said)
        seen.prompt_tokens = len(tokens)
        self._open[name] = seen, on_end
        self._chunks[name] = seen.chunk_s
        self._drained.clear()
        arrival_s = self._hand_on(intended_s, len(tokens))
        wanted = EngineRequest(
            request_id=name,
            prompt_token_ids=tokens,
            sampling=_sampling,
            max_tokens=request.output_tokens,
            priority=int(request.parameters.get("priority", 0)),
            arrival_s=arrival_s,
        )
        self._loop.call_at(arrival_s, self._arrive, wanted)
        if request.cancel_after_s is not None:
            self._loop.call_at(intended_s + request.cancel_after_s, self._cancel, name)

    def _hand_on(self, sent_s: float, num_tokens: int) -> float:
        """The front end reads a request; when the engine has it."""
        frontend = self._frontend
        typical_s = frontend.request_s + num_tokens * frontend.prompt_token_s
        took_s = typical_s * quantile(frontend.request_spread, self._source.random())
        # Sent while a step ran, it is told here after that step's outputs, but came before them.
        free_s = self._free_s if sent_s >= self._outputs_s else self._free_before_s
        self._free_before_s = max(sent_s + took_s, free_s + took_s * _WORK_SHARE)
        self._free_s = max(self._free_s, self._free_before_s)
        return self._free_before_s

    def _arrive(self, wanted: EngineRequest) -> None:
        if wanted.request_id not in self._open:
            return  # it was cancelled on its way
        refused = self._core.add(wanted)
        if refused is not None:
            self._take([refused])
        else:
            self._loop.work = self._step

    def _step(self) -> None:
        """Steps while there is something to compute. What happens outside of the engine during a step comes before the
        next one: a user has the answer, and what follows is in the inbox."""
        while not self._loop.is_anything_due():
            self._step_once()
            if not self._core.has_work():
                self._loop.work = None
                return

    def _step_once(self) -> None:
        outputs = self._core.step()
        now_s = self._loop.simulated_s
        if outputs:
            self._take(outputs)
        if now_s - self._sampled_s >= SAMPLE_S:
            self._sampled_s = now_s
            self.samples.append((now_s, self._sample()))

    def _sample(self) -> dict[str, float]:
        stats = self._core.stats()
        held = stats.num_blocks - stats.num_free_blocks - stats.num_cached_blocks
        return {
            "running": float(stats.num_running), "waiting": float(stats.num_waiting),
            "kv_usage": held / stats.num_blocks,
        }  # fmt: skip

    def _take(self, outputs: list[RequestOutput]) -> None:
        """The engine gives them to the front end, which writes one after another.

        Of a request whose last output it has not come to yet, both go out as one.
        """
        frontend = self._frontend
        output_s = frontend.output_s * quantile(frontend.output_spread, self._source.random())
        self._outputs_s, self._free_before_s = self._loop.simulated_s, self._free_s
        first_s = now_s = self._outputs_s + output_s
        next_s = max(first_s, self._free_s + frontend.next_output_s)
        is_behind, chunks_of, gap_s = next_s > first_s, self._chunks.get, frontend.next_output_s
        for output in outputs:
            chunks = chunks_of(output.request_id)
            if output.token_ids and chunks is not None and not (is_behind and chunks and chunks[-1] > first_s):
                now_s = next_s if chunks else next_s + frontend.first_output_s
                chunks.append(now_s)
                next_s = now_s + gap_s
            if output.finish_reason is not None and output.request_id in self._open:
                self._conclude(output, output.finish_reason, now_s)
        self._free_s = max(self._free_s, now_s)

    def _conclude(self, output: RequestOutput, reason: FinishReason, now_s: float) -> None:
        """The last output of an open request reaches the client."""
        seen, on_end = self._open.pop(output.request_id)
        del self._chunks[output.request_id]
        if seen.request.session:
            seen.token_ids = [_ANSWER_TOKEN] * len(seen.chunk_s)
        seen.output_tokens = output.num_output_tokens or len(seen.chunk_s)
        is_one_each = len(seen.chunk_s) == seen.output_tokens
        seen.chunk_tokens = array("l", (1 if is_one_each else 0,)) * len(seen.chunk_s)
        seen.cached_tokens = output.num_cached_tokens
        seen.finish_reason, seen.is_done = reason.value, True
        if output.error is not None:
            seen.status = output.error.status
        if seen.request.extends_session:
            seen.text = " ".join(map(str, seen.token_ids))
        seen.conclude(now_s)
        self._num_ending += 1
        self._loop.call_at(now_s, self._end, seen, on_end)

    def _end(self, seen: Observation, on_end: Callable[[Observation], None]) -> None:
        self._num_ending -= 1
        self._on_observation(seen)
        on_end(seen)
        if not self.num_in_flight:
            self._drained.set()

    def _cancel(self, name: str) -> None:
        if name not in self._open:
            return
        seen, on_end = self._open[name]
        seen.is_cancelled = True
        self._take(self._core.abort([name], FinishReason.ABORT))
        if self._open.pop(name, None) is not None:  # it had not reached the engine
            del self._chunks[name]
            seen.conclude(self._loop.simulated_s)
            self._num_ending += 1
            self._end(seen, on_end)

    async def wait_drained(self) -> None:
        await self._drained.wait()


def prompt_tokens(request: PlannedRequest, said: list[Message] | None) -> list[int]:
    """Token ids as they are; a word of a message or text stands for a token, a number for that token."""
    prompt = request.prompt
    if isinstance(prompt, list) and not request.is_chat:
        return cast(list[int], prompt)
    messages = [*(said or ()), *cast(list[Message], prompt)] if request.is_chat else [{"content": prompt}]
    words = [word for message in messages for word in str(message.get("content") or "").split()]
    return [int(word) if word.isdigit() else hash_word(word) for word in words] or [0]


def hash_word(word: str) -> int:
    """Some token for a word, always the same one."""
    return int.from_bytes(word.encode()[:8], "big") % (1 << 19)


@dataclass(frozen=True)
class SimulatedEngine:
    """The settings of an engine as they are in EngineConfig. block_copy_s: of a block between device and host tier."""

    cache: CacheConfig
    scheduler: SchedulerConfig
    block_copy_s: float = 0.0

    @classmethod
    def of(cls, options: EngineOptions, num_blocks: int, block_size: int, max_model_len: int) -> SimulatedEngine:
        """As a server with these options would be built."""
        options = with_limits(options)
        step_tokens = max(options.max_num_batched_tokens, options.max_num_seqs)
        scheduler = scheduler_config(options, max_model_len, step_tokens)
        scheduler = msgspec.structs.replace(scheduler, watermark_blocks=watermark_blocks(num_blocks))
        cache = CacheConfig(
            block_size=block_size, num_blocks=num_blocks, enable_prefix_caching=options.enable_prefix_caching
        )
        return cls(cache, scheduler)

    def with_host_tier(self, num_blocks: int, block_copy_s: float) -> SimulatedEngine:
        """With so many blocks of the host's memory behind the device's KV cache."""
        cache = msgspec.structs.replace(self.cache, num_host_blocks=num_blocks)
        return SimulatedEngine(cache, self.scheduler, block_copy_s)

    def check(self) -> None:
        """Raises ConfigError."""
        if self.cache.num_blocks < 1:
            raise ConfigError("The simulated engine needs a KV cache.", remedy="Give its number of blocks.")
        if not 0 <= self.cache.num_host_blocks <= MAX_HOST_BLOCKS:
            raise ConfigError(
                f"A host tier of {self.cache.num_host_blocks} blocks cannot be simulated.",
                remedy=f"Give 0 to {MAX_HOST_BLOCKS}.",
            )
        if self.cache.num_host_blocks and not self.block_copy_s > 0:
            raise ConfigError("Nothing says how fast the link to the host tier is.", remedy="Give --gpu.")


@dataclass(frozen=True)
class Simulation:
    """A simulated run. speedup: simulated seconds a second. busy_share: of the device.

    num_host_hit_tokens: of the record's cached tokens, those that came back from the host tier.
    """

    record: RunRecord
    speedup: float
    num_steps: int
    busy_share: float
    num_host_hit_tokens: int = 0


def run_simulation(engine: SimulatedEngine, step_time: StepTime, workload: Workload, seed: int) -> Simulation:
    """Plays the workload against the engine. Raises ConfigError."""
    engine.check()
    started_s = time.perf_counter()

    async def main() -> tuple[RunRecord, SimulatedExecutor, int]:
        loop = cast(SimulatedLoop, asyncio.get_running_loop())
        link = HostLink(engine.block_copy_s) if engine.cache.num_host_blocks else None
        executor = SimulatedExecutor(loop, step_time, link, seed)
        core = EngineCore(Scheduler(engine.scheduler, KVCacheManager(engine.cache)), executor, loop.time)
        observations: list[Observation] = []
        client = SimulatedClient(core, step_time, observations.append, seed)
        run = LoadRun(client, workload.plan(seed), workload.scale)
        await (run.open_loop() if workload.concurrency is None else run.closed_loop(workload.concurrency))
        end_s = max((seen.ended_s for seen in observations), default=run.start_s)
        samples = [(moment_s - run.start_s, values) for moment_s, values in client.samples]
        record = RunRecord(
            observations, run.start_s, end_s, array("d"), num_skipped=run.num_skipped, server_samples=samples
        )
        return record, executor, core.stats().num_host_hit_tokens

    record, executor, host_tokens = simulate(main)
    simulated_s = max(record.end_s - record.start_s, 1e-9)
    took_s = max(time.perf_counter() - started_s, 1e-9)
    return Simulation(record, simulated_s / took_s, executor.num_steps, executor.busy_s / simulated_s, host_tokens)
