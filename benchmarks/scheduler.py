"""What a step costs the scheduler: schedule() and update(), by running and by queued requests.

    python benchmarks/scheduler.py [--short]

Pure policy, no model: every step's result is made up at once, one step is always in flight. Prints a table and writes
benchmarks/results/scheduler.png. Milliseconds are processor time.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from penstock.config.engine import CacheConfig, SchedulerConfig
from penstock.kvcache import KVCacheManager
from penstock.messages import EngineRequest, SampledTokens, SamplingParams, SchedulerOutput, StepResult
from penstock.scheduler import Scheduler

RESULTS = Path(__file__).parent / "results"
LIMIT_MS = 2.0
NUM_WARM = 40  # steps until all rows are taken


@dataclass
class Workload:
    """shared_prefix: tokens that all prompts have in common. max_tokens: short ones keep admissions coming."""

    name: str
    num_running: int
    num_queued: int
    prompt_tokens: int
    max_tokens: int
    shared_prefix: int = 0


@dataclass
class Times:
    """Milliseconds of every step, sorted."""

    schedule: list[float]
    update: list[float]

    @staticmethod
    def at(values: list[float], quantile: float) -> float:
        return values[min(len(values) - 1, int(quantile * len(values)))]


def request_of(number: int, workload: Workload) -> EngineRequest:
    own = workload.prompt_tokens - workload.shared_prefix
    return EngineRequest(
        request_id=f"{number:032x}",
        prompt_token_ids=[1] * workload.shared_prefix + [(number * 7919 + i) % 100_000 for i in range(own)],
        sampling=SamplingParams(),
        max_tokens=workload.max_tokens + number % 7,
        stop_token_ids=(2,),
        arrival_s=0.0,
        deadline_s=1e9,
    )


def result_of(output: SchedulerOutput) -> StepResult:
    sampled = {share.request_id: SampledTokens([5]) for share in output.scheduled if share.samples}
    return StepResult(output.step_id, sampled, {}, {}, 0.01)


def measure(workload: Workload, num_steps: int) -> Times:
    """Fills the rows, then measures; keeps the queue at its length.

    Counts the thread's processor time: what other processes do to this one is not the scheduler's cost.
    """
    kv = KVCacheManager(CacheConfig(block_size=16, num_blocks=100_000))
    config = SchedulerConfig(
        max_num_seqs=workload.num_running,
        max_num_batched_tokens=2048,
        max_model_len=8192,
        max_num_queued_requests=100_000,
        max_num_queued_tokens=10**9,
        watermark_blocks=100,
    )
    scheduler = Scheduler(config, kv)
    numbers = itertools.count()
    schedule_ms, update_ms = [], []
    in_flight: SchedulerOutput | None = None
    for turn in range(NUM_WARM + num_steps):
        missing = workload.num_queued + workload.num_running - len(scheduler._requests)
        for _ in range(missing):
            scheduler.add(request_of(next(numbers), workload), turn * 0.01)
        started = time.thread_time()
        output = scheduler.schedule(turn * 0.01)
        scheduled = time.thread_time()
        result = result_of(in_flight) if in_flight is not None else None
        resumed = time.thread_time()
        if in_flight is not None and result is not None:
            scheduler.update(in_flight, result, turn * 0.01)
        ended = time.thread_time()
        in_flight = output
        if turn >= NUM_WARM:
            schedule_ms.append((scheduled - started) * 1e3)
            update_ms.append((ended - resumed) * 1e3)
    return Times(sorted(schedule_ms), sorted(update_ms))


def workloads(short: bool) -> list[Workload]:
    queues = [0, 10_000] if short else [0, 100, 1_000, 3_000, 10_000]
    decodes = [
        Workload("decode", running, queued, 64, 4000)
        for running in ([32, 64] if short else [32, 64, 128, 256])
        for queued in queues
    ]
    churn = [
        Workload("admitting", running, 10_000, prompt, 16) for running, prompt in ((64, 128), (256, 128), (64, 1024))
    ]
    shared = [Workload("admitting, shared prefix", 64, 10_000, 1088, 16, shared_prefix=1024)]
    return decodes + churn + shared


def plot(rows: list[tuple[Workload, Times]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 4))
    for running in sorted({workload.num_running for workload, _ in rows if workload.name == "decode"}):
        line = [(w.num_queued, t) for w, t in rows if w.name == "decode" and w.num_running == running]
        queued = [number for number, _ in line]
        (drawn,) = axes.plot(queued, [Times.at(t.schedule, 0.5) for _, t in line], "o-", label=f"{running} running")
        axes.plot(queued, [Times.at(t.schedule, 0.99) for _, t in line], ":", color=drawn.get_color())
    for workload, times in rows:
        if workload.name != "decode":
            label = f"{workload.name}, {workload.num_running} running, {workload.prompt_tokens} tokens"
            axes.plot([workload.num_queued], [Times.at(times.schedule, 0.99)], "x", label=f"{label} (p99)")
    axes.axhline(LIMIT_MS, color="black", linewidth=1)
    axes.set(xlabel="queued requests", ylabel="schedule(), ms (dotted: p99)", yscale="log", xscale="symlog")
    axes.set_xlim(left=-0.2)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=90, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer points and steps")
    short = parser.parse_args().short
    rows = []
    print(
        f"{'workload':26} {'running':>8} {'queued':>7} {'prompt':>7}",
        "   schedule() ms p50 / p99 / max    update() ms p50",
    )
    for workload in workloads(short):
        times = measure(workload, 200 if short else 600)
        rows.append((workload, times))
        p50, p99, worst = (Times.at(times.schedule, quantile) for quantile in (0.5, 0.99, 1.0))
        print(
            f"{workload.name:26} {workload.num_running:8} {workload.num_queued:7} {workload.prompt_tokens:7}   "
            f"{p50:8.3f} / {p99:8.3f} / {worst:8.3f}  {Times.at(times.update, 0.5):14.3f}",
            flush=True,
        )
    RESULTS.mkdir(exist_ok=True)
    plot(rows, RESULTS / "scheduler.png")
    worst = max(Times.at(times.schedule, 0.99) for _, times in rows)
    print(f"worst p99 of schedule(): {worst:.3f} ms (limit {LIMIT_MS} ms)")


if __name__ == "__main__":
    main()
