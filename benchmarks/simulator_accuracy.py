#!/usr/bin/env python3
"""How well the simulator and the advisor foretell a server's latencies on this machine.

    simulator_accuracy.py [--model DIR] [--rounds 3] [--seconds 10] [--scale 1]

One server records its steps. In rounds, so that a machine that changes its speed changes it for all: a while of
calibration load, then each workload. The step model is fitted to the calibration's steps alone; then the simulator
plays the same requests. Three workloads are the simulator's (its distributions are compared), three the advisor's (what
it would tell of the default settings is compared); none of them is in the calibration.

--scale divides the rates: 1 is for the bundled model, about 25 for one of a billion weights on two cores.
Writes simulator-<model>.json and .md to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.advisor.advice import CONFIRMING_DRAWS, Candidate, Platform, predict
from penstock.bench.arrivals import arrival_times, dated, parse_rate, unit_gaps
from penstock.bench.calibration import (
    CalibrationLoad,
    StepLog,
    fit_frontend,
    latest_step_log,
    longest_prompt,
    profile_of,
)
from penstock.bench.datasets import Shape, conversations, prefix_tree, random_prompts
from penstock.bench.environment import manifest
from penstock.bench.load_run import RunRecord
from penstock.bench.measure import RunOptions, Workload, run_loop, run_once
from penstock.bench.metrics import Summary, summarise
from penstock.bench.observation import Observation
from penstock.bench.plan import PlannedRequest
from penstock.bench.prompts import PromptMaker
from penstock.bench.server_metrics import served_model
from penstock.bench.simulator import SimulatedEngine, run_simulation
from penstock.bench.startup import ServerProcess
from penstock.bench.step_time import Profile, kind_of
from penstock.bench.target import Target
from penstock.config.resolve import EngineOptions

RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).resolve().parent / "results"))
SHARES = (0.5, 0.9, 0.99)
Requests = Callable[[PromptMaker, int, int], Iterable[PlannedRequest]]


@dataclass(frozen=True)
class Case:
    """A workload. rate: requests a second of the bundled model; None: a closed loop of `users`."""

    name: str
    make: Requests
    rate: float | None = None
    users: int | None = None
    process: str = "poisson"
    is_held_out: bool = False

    def title(self, scale: float) -> str:
        """With its rate."""
        return f"{self.name}, {self.process} {self.rate / scale:.3g}/s" if self.rate is not None else self.name

    def count(self, seconds: float, scale: float) -> int:
        per_second = self.rate if self.rate is not None else 4.0 * (self.users or 1)
        return max(8, round(per_second * seconds / scale))

    def workload(self, count: int, scale: float, token_limit: int) -> Workload:
        maker = PromptMaker(as_chat=False, token_limit=token_limit)

        def plan(seed: int) -> Iterable[PlannedRequest]:
            requests = self.make(maker, count, seed)
            if self.rate is None:
                return requests
            gaps = unit_gaps(self.process, 0.3, seed)
            return dated(requests, arrival_times(parse_rate(f"{self.rate / scale:.4f}"), gaps))

        return Workload(plan, self.users)


def _random(input_len: int, output_len: int, spread: float = 0.0) -> Requests:
    return lambda maker, count, seed: random_prompts(Shape(input_len, output_len, spread), maker, count, seed)


def _tree(*levels: tuple[int, int], input_len: int, output_len: int) -> Requests:
    shape = Shape(input_len, output_len, levels=levels)
    return lambda maker, count, seed: prefix_tree(shape, maker, count, seed)


def _talks(input_len: int, output_len: int, turns: int, think_s: float) -> Requests:
    shape = Shape(input_len, output_len, 0.5, turns=turns, think_s=think_s)

    def make(maker: PromptMaker, count: int, seed: int) -> Iterable[PlannedRequest]:
        return conversations(shape, PromptMaker(as_chat=True, token_limit=maker.token_limit), count, seed)

    return make


CASES = (
    Case("random 200 +- half, 32 out", _random(200, 32, 0.5), rate=20),
    Case("prefix tree 256x4, 64x4, 64 of their own, 24 out",
         _tree((256, 4), (64, 4), input_len=64, output_len=24), rate=25),
    Case("random 128, 48 out, 8 users", _random(128, 48), users=8),
    Case("random 400, 16 out", _random(400, 16), rate=10, process="gamma", is_held_out=True),
    Case("random 32 +- half, 64 out", _random(32, 64, 0.5), rate=15, is_held_out=True),
    Case("prefix tree 400x2, 32 of their own, 40 out, 4 users", _tree((400, 2), input_len=32, output_len=40), users=4,
         is_held_out=True),
)  # fmt: skip


@dataclass
class Measured:
    """The runs of one case, a round each."""

    case: Case
    workload: Workload
    records: list[RunRecord] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    windows: list[tuple[float, float]] = field(default_factory=list)


class Accuracy:
    """One run of the script."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.windows: list[tuple[float, float]] = []
        self.loads: list[list[Observation]] = []
        self.measured = [
            Measured(
                case, case.workload(case.count(options.seconds, options.scale), options.scale, options.token_limit)
            )
            for case in CASES
        ]

    def measure(self) -> StepLog:
        """All steps, those of the calibration being in `windows`, after all rounds."""
        with tempfile.TemporaryDirectory() as directory:
            model = [str(self.options.model)] if self.options.model else []
            arguments = [*model, "--record", directory, "--log-level", "warning", *self.options.serve.split()]
            with ServerProcess(arguments) as server:
                server.wait_until_ready()
                target = Target.of(server.url, "")
                target = Target.of(server.url, served_model(target))
                longest = longest_prompt(latest_step_log(Path(directory)))
                run_loop(lambda: self._rounds(target, longest))
            return latest_step_log(Path(directory))

    async def _rounds(self, target: Target, longest: int) -> None:
        options = RunOptions(sample_server=False)
        for number in range(self.options.rounds):
            load = CalibrationLoad(target, longest)
            start_s = time.monotonic()
            await load.run(self.options.calibration, lambda _line: None)
            self.windows.append((start_s, time.monotonic()))
            self.loads = load.observations if not self.loads else [
                before + after for before, after in zip(self.loads, load.observations, strict=True)
            ]  # fmt: skip
            for one in self.measured:
                seed = 1000 + number
                one.seeds.append(seed)
                record = await run_once(target, one.workload, seed, options)
                one.records.append(record)
                one.windows.append((record.start_s, record.end_s))
                print(f"round {number + 1}: {one.case.name}", file=sys.stderr, flush=True)


def within(log: StepLog, windows: list[tuple[float, float]]) -> StepLog:
    """The steps that began in one of the windows."""
    inside = [step for step in log.steps if any(low <= step.started_s <= high for low, high in windows)]
    return StepLog(log.header, inside)


def step_ratio(log: StepLog, profile: Profile) -> float:
    """Modelled over measured time of these steps: how far the machine, or the model, was off for them."""
    model = profile.step_time
    modelled = sum(model.seconds(step.work) * statistics.fmean(model.spreads[kind_of(step.work)]) for step in log.steps)
    return modelled / sum(step.seconds for step in log.steps)


def joined(records: list[RunRecord]) -> Summary:
    """Several runs' requests as one sample."""
    observations = [seen for record in records for seen in record.observations]
    last = records[-1]
    return summarise(RunRecord(observations, records[0].start_s, last.end_s, array("d")), ())


def simulated(one: Measured, profile: Profile) -> tuple[Summary, float]:
    """The same requests in the simulator, and how many times faster that was."""
    engine = SimulatedEngine.of(EngineOptions(), profile.num_blocks, profile.block_size, profile.max_model_len)
    found = [run_simulation(engine, profile.step_time, one.workload, seed) for seed in one.seeds]
    return joined([one.record for one in found]), statistics.median(one.speedup for one in found)


def advised(one: Measured, profile: Profile) -> Summary:
    """What `penstock advise` says of this workload on one replica with the default settings, of other draws of it."""
    platform = Platform("here", profile.step_time, profile.num_blocks, profile.block_size, profile.max_model_len)
    candidate = Candidate(platform, 1, EngineOptions().max_num_seqs, EngineOptions().max_num_batched_tokens)
    return predict(candidate, one.workload, (), 1, CONFIRMING_DRAWS).summary


def compare(real: Summary, found: Summary) -> list[dict[str, Any]]:
    rows = []
    for metric in ("ttft", "itl"):
        for share in SHARES:
            one, other = real.latency[metric].at(share), found.latency[metric].at(share)
            rows.append({
                "metric": metric, "percentile": share * 100, "server_ms": one.value * 1e3, "low_ms": one.low * 1e3,
                "high_ms": one.high * 1e3, "simulated_ms": other.value * 1e3, "ratio": other.value / one.value,
            })  # fmt: skip
        mean, other_mean = real.latency[metric].mean, found.latency[metric].mean
        if mean and other_mean:
            rows.append({
                "metric": metric, "percentile": None, "server_ms": mean * 1e3, "simulated_ms": other_mean * 1e3,
                "ratio": other_mean / mean,
            })  # fmt: skip
    return rows


def table(results: list[dict[str, Any]]) -> str:
    heads = [f"{metric} {name}" for metric in ("TTFT", "ITL") for name in ("p50", "p90", "p99", "mean")]
    lines = [f"| workload (modelled over measured time of its steps) | what | {' | '.join(heads)} |"]
    lines.append("|---|---|" + "---|" * len(heads))
    for result in results:
        for what, key in (("server, ms", "server_ms"), (f"{result['by']}, ms", "simulated_ms"), ("ratio", "ratio")):
            cells = [f"{row[key]:.2f}" for row in result["rows"]]
            name = f"{result['name']} ({result['step_ratio']:.2f})" if key == "server_ms" else ""
            lines.append(f"| {name} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint directory [the bundled model]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each workload in a round, about [8]")
    parser.add_argument("--calibration", type=float, default=20.0, help="seconds in a round [20]")
    parser.add_argument("--scale", type=float, default=1.0, help="divides the rates [1]")
    parser.add_argument("--token-limit", type=int, default=1000)
    parser.add_argument("--serve", default="", help="further options of the server")
    options = parser.parse_args()
    run = Accuracy(options)
    log = run.measure()
    calibration = within(log, run.windows)
    profile = profile_of(calibration, fit_frontend(calibration.steps, run.loads))
    results, speedups = [], []
    for one in run.measured:
        real = joined(one.records)
        if one.case.is_held_out:
            found = advised(one, profile)
        else:
            found, speedup = simulated(one, profile)
            speedups.append(speedup)
        results.append({
            "name": one.case.title(options.scale), "by": "advisor" if one.case.is_held_out else "simulator",
            "step_ratio": step_ratio(within(log, one.windows), profile), "requests": real.num_attempted,
            "failed": real.num_failed, "void": real.void, "rows": compare(real, found),
        })  # fmt: skip
    name = options.model.name if options.model else "bundled"
    facts = {"manifest": manifest(), "rounds": options.rounds, "steps": profile.step_time.num_steps,
             "step_model_error": profile.step_time.error, "speedup": statistics.median(speedups)}  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"simulator-{name}.json").write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    head = (
        f"# The simulator beside the server: {name}\n\n{facts['manifest']['date']}, "
        f"{facts['manifest']['client_machine']['processor']}, {os.cpu_count()} cores. "
        f"`{' '.join(['benchmarks/simulator_accuracy.py', *sys.argv[1:]])}`\n\n{options.rounds} rounds; the model was "
        f"fitted to {facts['steps']} steps of the calibration (median error {facts['step_model_error']:.1%}); "
        f"simulated {facts['speedup']:,.0f} times faster than real time.\n\n"
    )
    text = head + table(results) + "\n"
    (RESULTS / f"simulator-{name}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
