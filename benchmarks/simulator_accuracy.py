#!/usr/bin/env python3
"""How well the simulator and the advisor foretell a server's latencies on this machine.

    simulator_accuracy.py [--model DIR] [--rounds 3] [--seconds 10] [--scale 1] [--keep DIR]

A round is a fresh server that records its steps: each workload between two pieces of the calibration load, so that a
machine that changes its speed changes it for both. The step model is fitted to the calibrations' steps alone. Then
the simulator plays the requests of three workloads, and the advisor is given three others as a trace and asked what
the default settings would do; none of them is in the calibration. What either says of other draws of its workloads
shows how far chance alone moves each figure. Times count from when the client turned to a request: what its timer was
late (0.7 ms, the client's own fault and told by `bench serve` as send lag) is not the server's. Answers to random
tokens are full of parts of characters, which make no text: with their ids asked for, every token is an event.

--scale divides the rates: 1 is for the bundled model, about 25 for one of a billion weights on two cores.
--keep: where the rounds lie. Rounds that lie there already count too: they can be taken one at a time, whenever the
machine is quiet. With --rounds 0 nothing is measured.
Writes simulator-<model>.json and .md to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import psutil

from penstock.advisor.advice import Candidate, Platform, predict
from penstock.bench.arrivals import arrival_times, dated, parse_rate, unit_gaps
from penstock.bench.calibration import (
    CalibrationLoad,
    StepLog,
    fit_frontend,
    latest_step_log,
    longest_prompt,
    profile_of,
)
from penstock.bench.datasets import Shape, prefix_tree, random_prompts
from penstock.bench.environment import manifest
from penstock.bench.load_run import RunRecord
from penstock.bench.measure import RunOptions, Workload, run_loop, run_once
from penstock.bench.metrics import Summary, summarise
from penstock.bench.observation import Observation
from penstock.bench.plan import PlannedRequest
from penstock.bench.prompts import PromptMaker
from penstock.bench.results import read_requests, write_requests
from penstock.bench.server_metrics import served_model
from penstock.bench.simulator import SimulatedEngine, run_simulation
from penstock.bench.startup import ServerProcess
from penstock.bench.step_time import MIN_STEPS, Profile, coldness_of, occupied_seconds
from penstock.bench.target import Target
from penstock.config.resolve import EngineOptions, with_limits

RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).resolve().parent / "results"))
SHARES = (0.5, 0.9, 0.99)
FIRST_SEED = 1000
OTHER_DRAWS = 20
THROWS = 5  # of the dice for steps, on the same requests: what is foretold is a distribution
SPEED_S = 600.0
MAX_OTHERS = 0.04  # of the machine: a window with more proves nothing
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
        # Of its own seed: cases share a server, and blocks of one name begin alike.
        maker = PromptMaker(as_chat=False, token_limit=token_limit, seed=CASES.index(self))

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


CASES = (
    Case("random 200 +- half, 32 out", _random(200, 32, 0.5), rate=20),
    Case("prefix tree 256x4, 64x4, 64 of their own, 24 out",
         _tree((256, 4), (64, 4), input_len=64, output_len=24), rate=25),
    # Users whose requests are all of one length march in step: their median TTFT lies in the gap between two modes.
    Case("random 128 +- half, 48 +- half out, 8 users", _random(128, 48, 0.5), users=8),
    Case("random 400, 16 out", _random(400, 16), rate=10, process="gamma", is_held_out=True),
    Case("random 32 +- half, 64 out", _random(32, 64, 0.5), rate=15, is_held_out=True),
    Case("prefix tree 400x2, 32 of their own, 40 out", _tree((400, 2), input_len=32, output_len=40), rate=12,
         is_held_out=True),
)  # fmt: skip


@dataclass
class Measured:
    """The runs of one case, a round each."""

    case: Case
    workload: Workload
    seeds: list[int] = field(default_factory=list)
    records: list[RunRecord] = field(default_factory=list)


def measure_round(options: argparse.Namespace, directory: Path, number: int) -> None:
    """One server's calibration and cases, kept in the directory."""
    model = [str(options.model)] if options.model else []
    arguments = [*model, "--record", str(directory), "--log-level", "warning", *options.serve.split()]
    with ServerProcess(arguments) as server:
        server.wait_until_ready()
        target = Target.of(server.url, "")
        target = replace(Target.of(server.url, served_model(target)), parameters={"return_token_ids": True})
        longest = longest_prompt(latest_step_log(directory))
        run_loop(lambda: _round(target, longest, options, directory, number))


class OtherWork:
    """What processes that are not ours take of the machine, window by window."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self._before = self._now()

    def _now(self) -> tuple[float, float, float]:
        """Seconds: of the clock, of all processors at work, of this process and those that it started."""
        times = psutil.cpu_times()._asdict()
        busy_s = sum(times.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
        me = psutil.Process()
        own = [process.cpu_times() for process in (me, *me.children(recursive=True))]
        return time.monotonic(), busy_s, sum(found.user + found.system for found in own)

    def begin(self) -> None:
        self._before = self._now()

    def end(self) -> None:
        """Of a window: notes the share of all processors' time."""
        before, after = self._before, self._now()
        seconds, busy_s, own_s = (new - old for new, old in zip(after, before, strict=True))
        self.shares.append(max(0.0, (busy_s - own_s) / seconds / (os.cpu_count() or 1)))


async def _round(target: Target, longest: int, options: argparse.Namespace, directory: Path, number: int) -> None:
    load, calibrations, others = CalibrationLoad(target, longest), OtherWork(), OtherWork()
    piece_s = options.calibration / (len(CASES) + 1)
    for index, case in enumerate(CASES):
        await _calibrate(load, calibrations, piece_s)
        others.begin()
        record = await run_once(
            target, workload_of(case, options), FIRST_SEED + number, RunOptions(sample_server=False)
        )
        others.end()
        record.start_s = 0.0
        write_requests(directory / f"case-{index}.jsonl", record)
    await _calibrate(load, calibrations, piece_s)
    for index, observations in enumerate(load.observations):
        # A run that starts at 0 is written by the machine's own clock, which is that of the steps.
        write_requests(directory / f"calibration-{index}.jsonl", RunRecord(observations, 0.0, 0.0, array("d")))
    shares = calibrations.shares + others.shares
    (directory / "others.json").write_text(json.dumps(shares))
    print(f"round {number + 1}: others had {', '.join(f'{share:.1%}' for share in shares)}", file=sys.stderr)


async def _calibrate(load: CalibrationLoad, others: OtherWork, seconds: float) -> None:
    num_before = len(load.observations)

    def next_phase(_: str) -> None:
        if len(load.observations) > num_before:
            others.end()
        others.begin()

    await load.run(seconds, next_phase)
    others.end()


def workload_of(case: Case, options: argparse.Namespace) -> Workload:
    return case.workload(case.count(options.seconds, options.scale), options.scale, options.token_limit)


def read_record(path: Path) -> RunRecord:
    """A kept run, on the machine's clock, without the client's own lag."""
    record = read_requests(path)
    for seen in record.observations:
        seen.intended_s = seen.started_s
    record.start_s = min(seen.intended_s for seen in record.observations)
    return record


class Rounds:
    """All that lie in a directory, without the windows in which others took too much of the machine."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        finished = [path.parent for path in directory.glob("round-*/others.json")]
        self.places = sorted(finished, key=lambda place: int(place.name.removeprefix("round-")))
        self.numbers = [int(place.name.removeprefix("round-")) for place in self.places]
        self.num_windows = self.num_void = 0
        self._quiet = [self._are_quiet(place) for place in self.places]
        self._case_spans = {
            place: [(record.start_s, record.end_s)
                    for record in (read_record(place / f"case-{index}.jsonl") for index in range(len(CASES)))]
            for place in self.places
        }  # fmt: skip
        self.measured = [self._measured(options, index) for index in range(len(CASES))]
        logs = [latest_step_log(place) for place in self.places]
        self.log = StepLog(logs[0].header, [step for log in logs for step in log.steps])

    def _are_quiet(self, place: Path) -> list[bool]:
        found = [share <= MAX_OTHERS for share in json.loads((place / "others.json").read_text())]
        self.num_windows += len(found)
        self.num_void += found.count(False)
        return found

    def _measured(self, options: argparse.Namespace, index: int) -> Measured:
        one = Measured(CASES[index], workload_of(CASES[index], options))
        for number, place, quiet in zip(self.numbers, self.places, self._quiet, strict=True):
            if quiet[index - len(CASES)]:
                one.seeds.append(FIRST_SEED + number)
                one.records.append(read_record(place / f"case-{index}.jsonl"))
        return one

    def profile(self, one: Measured) -> Profile:
        """Fitted to the calibrations of the rounds in which this case counts; as fast as the machine was just before it
        and behind it: one that others share is up to twice as fast at one time as at another."""
        observations: list[Observation] = []
        windows, beside = [], []
        for number, place, quiet in zip(self.numbers, self.places, self._quiet, strict=True):
            if FIRST_SEED + number not in one.seeds:
                continue
            before_s, behind_s = self._gap_around(one, place)
            for index, is_quiet in enumerate(quiet[: -len(CASES)]):
                path = place / f"calibration-{index}.jsonl"
                if is_quiet and path.stat().st_size:  # a phase that the time did not suffice for is empty
                    record = read_record(path)
                    observations += record.observations
                    windows.append((record.start_s, record.end_s))
                    if before_s <= record.start_s and record.end_s <= behind_s:
                        beside.append(windows[-1])
        calibration = within(self.log, windows)
        profile = profile_of(calibration, fit_frontend(calibration.steps, observations))
        return at_speed_of(within(self.log, beside), profile)

    def _gap_around(self, one: Measured, place: Path) -> tuple[float, float]:
        """When the case before this one ended, and when the next began."""
        spans = self._case_spans[place]
        index = CASES.index(one.case)
        return spans[index - 1][1] if index else -math.inf, spans[index + 1][0] if index + 1 < len(spans) else math.inf

    def steps_of(self, one: Measured) -> StepLog:
        """The steps of one case."""
        return within(self.log, [(record.start_s, record.end_s) for record in one.records])


def within(log: StepLog, windows: list[tuple[float, float]]) -> StepLog:
    """The steps that began in one of the windows."""
    inside = [step for step in log.steps if any(low <= step.started_s <= high for low, high in windows)]
    return StepLog(log.header, inside)


def at_speed_of(log: StepLog, profile: Profile) -> Profile:
    """The profile of a machine that is as fast as it was for these steps: those without prompts and those with."""
    fitted = profile.step_time
    decodes, prompts = (step_ratio(log, profile, has_prompts) for has_prompts in (False, True))
    step_time = msgspec.structs.replace(
        fitted,
        coefficients=[found / decodes for found in fitted.coefficients],
        prompt_coefficients=[found / prompts for found in fitted.prompt_coefficients],
    )
    return msgspec.structs.replace(profile, step_time=step_time)


def step_ratio(log: StepLog, profile: Profile, has_prompts: bool | None = None) -> float:
    """Modelled over measured time of these steps, or of those with prompts or without: how far the machine, or the
    model, was off for them. 1 of too few."""
    model = profile.step_time
    modelled, measured = list[float](), list[float]()
    for step, coldness, seconds in zip(log.steps, coldness_of(log.steps), occupied_seconds(log.steps), strict=True):
        if has_prompts is None or has_prompts == (step.work.prefill_pairs > 0):
            modelled.append(statistics.fmean(model.draw(step.work, share / 50, coldness) for share in range(50)))
            measured.append(seconds)
    return sum(modelled) / sum(measured) if len(measured) >= MIN_STEPS else 1.0


def joined(records: list[RunRecord]) -> Summary:
    """Several runs' requests as one sample."""
    observations = [seen for record in records for seen in record.observations]
    last = records[-1]
    return summarise(RunRecord(observations, records[0].start_s, last.end_s, array("d")), ())


def engine_of(profile: Profile) -> SimulatedEngine:
    return SimulatedEngine.of(EngineOptions(), profile.num_blocks, profile.block_size, profile.max_model_len)


def these(workload: Workload, seeds: Sequence[int]) -> Workload:
    """Run number i is the i-th of these draws of it, and throws dice of its own for how long steps take."""
    return replace(workload, plan=lambda number: workload.plan(seeds[number]))


def simulated(one: Measured, profile: Profile, seeds: Sequence[int]) -> Summary:
    """These draws of the workload in the simulator."""
    engine, workload = engine_of(profile), these(one.workload, seeds)
    numbers = range(len(seeds))
    return joined([run_simulation(engine, profile.step_time, workload, number).record for number in numbers])


def speedup(case: Case, profile: Profile, options: argparse.Namespace) -> int:
    """How many times faster than real time the simulator plays ten minutes of a workload."""
    workload = case.workload(case.count(SPEED_S, options.scale), options.scale, options.token_limit)
    return round(run_simulation(engine_of(profile), profile.step_time, workload, FIRST_SEED).speedup)


def advised(one: Measured, profile: Profile, seeds: Sequence[int]) -> Summary:
    """What `penstock advise` says of one replica with the default settings, the workload being these draws of it."""
    platform = Platform("here", profile.step_time, profile.num_blocks, profile.block_size, profile.max_model_len)
    usual = with_limits(EngineOptions())
    candidate = Candidate(platform, 1, usual.max_num_seqs, usual.max_num_batched_tokens)
    return predict(candidate, these(one.workload, seeds), (), 0, len(seeds)).summary


@dataclass(frozen=True)
class Figure:
    """A percentile, or the mean (share None), of a metric."""

    metric: str
    share: float | None

    def of(self, summary: Summary) -> float:
        """Seconds."""
        found = summary.latency[self.metric]
        return found.at(self.share).value if self.share else found.mean or math.nan

    def is_supported(self, summary: Summary) -> bool:
        """Whether the sample is large enough to speak of it."""
        return not self.share or summary.latency[self.metric].at(self.share).is_supported


FIGURES = [Figure(metric, share) for metric in ("ttft", "itl") for share in (*SHARES, None)]


def compare(real: Summary, found: Summary, others: list[Summary]) -> list[dict[str, Any]]:
    """others: of other draws of the workload, which show how far chance moves a figure."""
    rows = []
    for figure in FIGURES:
        one, other = figure.of(real), figure.of(found)
        drawn = sorted(figure.of(summary) * 1e3 for summary in others)
        rows.append({
            "metric": figure.metric, "percentile": figure.share and figure.share * 100, "server_ms": one * 1e3,
            "supported": figure.is_supported(real), "simulated_ms": other * 1e3, "ratio": other / one,
            "draws_low_ms": drawn[0], "draws_high_ms": drawn[-1],
        })  # fmt: skip
    return rows


def count_within(results: list[dict[str, Any]], by: str, limit: float) -> str:
    """How many of the figures that the samples support are foretold that well."""
    rows = [row for result in results if result["by"] == by for row in result["rows"] if row["supported"]]
    good = sum(1 / (1 + limit) <= row["ratio"] <= 1 + limit for row in rows)
    return f"{good} of the {by}'s {len(rows)} supported figures are within {limit:.0%} of the server's"


def table(results: list[dict[str, Any]]) -> str:
    heads = [f"{metric} {name}" for metric in ("TTFT", "ITL") for name in ("p50", "p90", "p99", "mean")]
    lines = [f"| workload (modelled over measured time of its steps) | what | {' | '.join(heads)} |"]
    lines.append("|---|---|" + "---|" * len(heads))
    for result in results:
        rows = result["rows"]
        name = f"{result['name']}, {result['requests']} requests ({result['step_ratio']:.2f})"
        cells = [f"{row['server_ms']:.2f}{'' if row['supported'] else '?'}" for row in rows]
        lines.append(f"| {name} | server, ms | {' | '.join(cells)} |")
        for what, key in ((f"{result['by']}, ms", "simulated_ms"), ("ratio", "ratio")):
            lines.append(f"| | {what} | {' | '.join(f'{row[key]:.2f}' for row in rows)} |")
        cells = [f"{row['draws_low_ms']:.1f} to {row['draws_high_ms']:.1f}" for row in rows]
        lines.append(f"| | {OTHER_DRAWS} other draws, ms | {' | '.join(cells)} |")
    return "\n".join(lines)


def judge(rounds: Rounds, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Everything found, and the page that shows it."""
    results, speedups, profiles = [], [], []
    for one in rounds.measured:
        if not one.records:
            continue
        profile = rounds.profile(one)
        profiles.append(profile.step_time)
        real, foretold = joined(one.records), advised if one.case.is_held_out else simulated
        found = foretold(one, profile, one.seeds * THROWS)
        others = [foretold(one, profile, range(draw * 100, draw * 100 + len(one.seeds))) for draw in range(OTHER_DRAWS)]
        if not one.case.is_held_out:
            speedups.append(speedup(one.case, profile, options))
        results.append({
            "name": one.case.title(options.scale), "by": "advisor" if one.case.is_held_out else "simulator",
            "step_ratio": step_ratio(rounds.steps_of(one), profile), "requests": real.num_attempted,
            "failed": real.num_failed, "void": real.void, "rows": compare(real, found, others),
        })  # fmt: skip
    if not results:
        raise SystemExit("Other processes disturbed every window: nothing can be said.")
    facts = {
        "manifest": manifest(), "rounds": len(rounds.places), "speedups": speedups,
        "steps": max(found.num_steps for found in profiles),
        "step_model_error": statistics.median(found.error for found in profiles),
    }  # fmt: skip
    name = options.model.name if options.model else "bundled"
    head = (
        f"# The simulator beside the server: {name}\n\n{facts['manifest']['date']}, "
        f"{facts['manifest']['client_machine']['processor']}, {os.cpu_count()} cores. "
        f"`{' '.join(['benchmarks/simulator_accuracy.py', *sys.argv[1:]])}`\n\n{facts['rounds']} rounds; the model was "
        f"fitted to {facts['steps']} steps of the calibrations (median error {facts['step_model_error']:.1%}); "
        f"{SPEED_S / 60:.0f} minutes of each workload simulated "
        f"{' / '.join(f'{found:,}' for found in speedups)} times faster than real time. "
        f"{count_within(results, 'simulator', 0.15)}, "
        f"{count_within(results, 'advisor', 0.2)}. `?`: too few requests for such a percentile. Left out: "
        f"{rounds.num_void} of {rounds.num_windows} windows, "
        f"in which other processes took more than {MAX_OTHERS:.0%} of the machine.\n\n"
    )
    return {**facts, "results": results}, head + table(results) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint directory [the bundled model]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each workload in a round, about [8]")
    parser.add_argument("--calibration", type=float, default=20.0, help="seconds in a round [20]")
    parser.add_argument("--scale", type=float, default=1.0, help="divides the rates [1]")
    parser.add_argument("--token-limit", type=int, default=1000)
    parser.add_argument("--serve", default="", help="further options of the server")
    parser.add_argument("--keep", type=Path, help="directory of the rounds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.keep or Path(scratch)
        first = len(list(directory.glob("round-*")))
        for number in range(first, first + options.rounds):
            measure_round(options, directory / f"round-{number}", number)
        result, text = judge(Rounds(options, directory), options)
    name = options.model.name if options.model else "bundled"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"simulator-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"simulator-{name}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
