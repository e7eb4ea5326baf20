"""Runs a workload against a target, once or several targets in turns, and keeps what there is to keep."""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from penstock.bench.load_client import Counts, LoadClient
from penstock.bench.load_run import LagMeter, LoadRun, RunRecord
from penstock.bench.observation import Observation
from penstock.bench.plan import PlannedRequest
from penstock.bench.sample_size import mean_interval
from penstock.bench.server_metrics import MetricsSampler
from penstock.bench.target import Connector, Target

Watcher = Callable[[Target, Counts, float], None]
WATCH_S: Final = 0.5


@dataclass(frozen=True)
class Workload:
    """What to send. plan: of a seed, since two runs with one seed would meet a warm prefix cache.

    concurrency: of a closed loop; None: open loop, the plan's own times. scale: stretches these.
    """

    plan: Callable[[int], Iterable[PlannedRequest]]
    concurrency: int | None = None
    scale: float = 1.0


@dataclass
class RunOptions:
    """watch: called every half second with the counts so far. connector, clock: others in simulated tests."""

    timeout_s: float = 600.0
    watch: Watcher | None = None
    sample_server: bool = True
    connector: Connector | None = None
    clock: Callable[[], float] = time.monotonic


async def run_once(target: Target, workload: Workload, seed: int, options: RunOptions) -> RunRecord:
    """One run on the running loop. Raises what the plan raises."""
    observations: list[Observation] = []
    client = LoadClient(
        target, observations.append, connector=options.connector, clock=options.clock, timeout_s=options.timeout_s
    )
    load = LoadRun(client, workload.plan(seed), workload.scale)
    sampler = MetricsSampler(target, options.clock) if options.sample_server else None
    watching = asyncio.create_task(_watch(target, client, options.watch)) if options.watch else None
    _quiet_the_collector()
    before_s = _cpu_seconds()
    lag = LagMeter(options.clock)
    try:
        if sampler is not None:
            sampler.start()
        await (load.open_loop() if workload.concurrency is None else load.closed_loop(workload.concurrency))
    finally:
        lag.stop()
        spent_s = _cpu_seconds() - before_s
        client.close()
        if watching is not None:
            watching.cancel()
        samples = await sampler.stop() if sampler is not None else []
        gc.unfreeze()
    end_s = max((seen.ended_s for seen in observations), default=load.start_s)
    samples = [(moment_s - load.start_s, values) for moment_s, values in samples]
    return RunRecord(observations, load.start_s, end_s, lag.lags_s, spent_s, load.num_skipped, samples)


@dataclass
class Comparison:
    """Rounds of runs: records[i][j] is round i against target j. The order within a round turns from round to round."""

    targets: Sequence[Target]
    records: list[list[RunRecord]] = field(default_factory=list)


async def run_rounds(
    targets: Sequence[Target], workload: Workload, seed: int, num_rounds: int, options: RunOptions
) -> Comparison:
    """Interleaved: what drifts on the machine drifts for all targets alike. All get the same requests in a round."""
    comparison = Comparison(targets)
    for number in range(num_rounds):
        found: dict[int, RunRecord] = {}
        for place in range(len(targets)):
            index = (place + number) % len(targets)
            found[index] = await run_once(targets[index], workload, seed + number, options)
        comparison.records.append([found[index] for index in range(len(targets))])
    return comparison


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure of one target over that of the first, paired by rounds; 95 % interval. differs: it excludes 1."""

    ratio: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        return self.low > 1 or self.high < 1


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Ratio:
    """values, base: one a round."""
    return Ratio(*mean_interval([value / other for value, other in zip(values, base, strict=True)]))


def run_loop(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a coroutine function on uvloop, where there is one."""
    factory = None
    if sys.platform != "win32":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


async def _watch(target: Target, client: LoadClient, watch: Watcher) -> None:
    start_s = client.clock()
    while True:
        await asyncio.sleep(WATCH_S)
        watch(target, client.counts, client.clock() - start_s)


def _quiet_the_collector() -> None:
    """A collection over a million objects takes longer than the lag that voids a run."""
    gc.collect()
    gc.freeze()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
