"""`penstock bench serve`: from options to a workload, from runs to tables and files."""

from __future__ import annotations

import argparse
import dataclasses
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from penstock.base.errors import ConfigError
from penstock.bench import arrivals, datasets, traces
from penstock.bench.capacity_search import SearchResult, search_capacity
from penstock.bench.environment import manifest
from penstock.bench.load_client import Counts
from penstock.bench.load_run import RunRecord
from penstock.bench.measure import Comparison, RunOptions, Workload, run_loop, run_once, run_rounds
from penstock.bench.metrics import Summary, summarise
from penstock.bench.plan import PlannedRequest
from penstock.bench.prompts import PromptMaker
from penstock.bench.report import Report, ReportedRun
from penstock.bench.results import run_json, summary_json, write_requests
from penstock.bench.server_metrics import served_model, tells_token_ids
from penstock.bench.slo import Slo, parse_slo
from penstock.bench.tables import comparison_table, definition_lines, search_table, summary_table
from penstock.bench.target import Target

DEFAULT_REQUESTS = 200
DEFAULT_CONCURRENCY = 16
MAX_REQUESTS = 100_000_000


def bench_serve(options: argparse.Namespace) -> int:
    """The exit status: 0 when the figures count and every request succeeded, else 1."""
    _check(options)
    raise_file_limit()
    slo = parse_slo(options.slo)
    seed = options.seed if options.seed is not None else secrets.randbits(31)
    targets = [make_target(url, options) for url in options.urls]
    measuring = Measuring(options, targets, slo, seed, Console(stderr=True))
    run_loop(measuring.run)
    measuring.show(Console())
    measuring.write()
    return 0 if measuring.is_good() else 1


def bench_replay(options: argparse.Namespace) -> int:
    """As bench_serve, of a trace; says how much of its prompts was found cached when it was recorded."""
    status = bench_serve(options)
    kind = traces.detect(options.path) if options.format == "auto" else options.format
    if kind == "penstock":
        share = traces.recorded_hit_share(options.path, options.requests)
        if share is not None:
            print(f"When it was recorded, {share:.1%} of the prompt tokens were cached.")
    return status


class Measuring:
    """One call of the command: what it runs, and what came of it."""

    def __init__(
        self, options: argparse.Namespace, targets: list[Target], slo: Slo, seed: int, progress: Console
    ) -> None:
        self._options = options
        self._targets = targets
        self._slo = slo
        self._seed = seed
        self._progress = progress
        self._run_options = RunOptions(options.timeout, None if options.quiet else self._watch)
        self.comparison = Comparison(targets)
        self.searches: list[tuple[Target, SearchResult]] = []

    async def run(self) -> None:
        await self._warm_up()
        if self._options.search:
            for target in self._targets:
                self.searches.append((target, await self._search(target)))
            return
        rounds = self._options.rounds or (1 if len(self._targets) == 1 else 3)
        workload = make_workload(self._options)
        self.comparison = await run_rounds(self._targets, workload, self._seed, rounds, self._run_options)

    async def _warm_up(self) -> None:
        maker = PromptMaker(self._options.chat, self._options.token_limit)
        shape = datasets.Shape(input_len=32, output_len=8)
        count = self._options.warmup
        workload = Workload(lambda seed: datasets.random_prompts(shape, maker, count, seed), concurrency=1)
        for target in self._targets if count else ():
            record = await run_once(target, workload, self._seed + 1_000_003, RunOptions(120.0, sample_server=False))
            if not any(seen.is_success for seen in record.observations):
                first = record.observations[0]
                raise ConfigError(
                    f"{target.url} answered none of the {count} warm-up requests: {first.failure}"
                    + (f": {first.refusal}" if first.refusal else "."),
                    remedy="Mend that, or give --warmup 0 to measure how it fails.",
                )

    async def _search(self, target: Target) -> SearchResult:
        """Trials last long enough for a queue to grow past the limits: see --trial-s."""
        options = self._options
        num_trials = 0

        async def trial(rate: float) -> Summary:
            nonlocal num_trials
            num_trials += 1
            count = max(options.requests or DEFAULT_REQUESTS, round(rate * options.trial_s))
            workload = make_workload(options, rate=str(rate), count=count)
            record = await run_once(target, workload, self._seed + num_trials, self._run_options)
            return summarise(record, self._slo)

        start = arrivals.parse_rate(options.rate)[0].first if options.rate else await self._busy_rate(target) / 2
        return await search_capacity(trial, start, options.tolerance)

    async def _busy_rate(self, target: Target) -> float:
        """What users who never pause get through (1 where none got anything): the capacity is seldom far from it."""
        workload = make_workload(self._options, count=2 * DEFAULT_CONCURRENCY)
        record = await run_once(target, workload, self._seed, self._run_options)
        return summarise(record, self._slo).request_rate or 1.0

    def _watch(self, target: Target, counts: Counts, elapsed_s: float) -> None:
        line = (
            f"{target.url}: {elapsed_s:.1f} s, {counts.num_sent} sent, {counts.num_ended} ended "
            f"({counts.num_ended / elapsed_s:.1f}/s), {counts.num_failed} failed, "
            f"{counts.num_sent - counts.num_ended} in flight, {counts.num_chunks / elapsed_s:.1f} chunks/s"
        )
        if self._progress.is_terminal:
            self._progress.print(f"\r\x1b[K{line}", end="", highlight=False, markup=False, soft_wrap=True)

    def records(self) -> Iterator[tuple[Target, RunRecord]]:
        for row in self.comparison.records:
            yield from zip(self._targets, row, strict=True)

    def is_good(self) -> bool:
        if self.searches:
            return all(result.kept > 0 for _, result in self.searches)
        summaries = [summarise(record, self._slo) for _, record in self.records()]
        return all(not summary.void and not summary.num_failed for summary in summaries)

    def show(self, console: Console) -> None:
        if self._progress.is_terminal and not self._options.quiet:
            self._progress.print("\r\x1b[K", end="")
        for _, result in self.searches:
            console.print(search_table(result))
        for target, record in self.records():
            console.print(summary_table(target.url, summarise(record, self._slo)))
        if len(self._targets) > 1 and self.comparison.records:
            console.print(comparison_table(self.comparison, self._slo))
        console.print("\n".join(definition_lines()), highlight=False, markup=False)

    def manifest(self) -> dict[str, Any]:
        options = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self._options).items()
            if name not in ("run", "command_parser", "api_key", "command", "bench_command") and value is not None
        }
        cache = "cold for these prompts: they follow from the seed" if self._options.seed is None else "unknown"
        return manifest(options=options, seed=self._seed, prefix_cache=cache, price_per_hour=self._options.price)

    def write(self) -> None:
        options = self._options
        if options.json is not None:
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(self._json()), indent=1))
        if options.html is not None:
            options.html.write_text(self._report().html(), encoding="utf-8")
        if options.requests_out is not None:
            for number, (_, record) in enumerate(self.records()):
                path = options.requests_out
                write_requests(path if number == 0 else path.with_suffix(f".{number}{path.suffix}"), record)

    def _report(self) -> Report:
        names = [f"{target.url}, {target.model}" for target in self._targets]
        runs = [
            ReportedRun(f"{name}, round {number + 1}", record, summarise(record, self._slo))
            for number, row in enumerate(self.comparison.records)
            for name, record in zip(names, row, strict=True)
        ]
        searches = [(target.url, result) for target, result in self.searches]
        title = f"penstock bench: {' against '.join(names)}"
        return Report(title, runs, self.manifest(), self._slo, searches, self._options.price)

    def _json(self) -> dict[str, Any]:
        facts = self.manifest()
        if self.searches:
            return {
                "manifest": facts,
                "searches": [
                    {"url": target.url, "kept_rate": result.kept, "broken_rate": result.broken,
                     "stopped": result.stopped, "trials": [
                         {"rate": trial.rate, "kept": trial.is_kept, **summary_json(trial.summary)}
                         for trial in result.trials]}
                    for target, result in self.searches
                ],
            }  # fmt: skip
        runs = [
            {"url": target.url, "model": target.model, **run_json(record, summarise(record, self._slo), facts)}
            for target, record in self.records()
        ]
        return runs[0] if len(runs) == 1 else {"manifest": facts, "runs": runs}


def make_target(url: str, options: argparse.Namespace) -> Target:
    """Raises ConfigError when the server does not answer."""
    key = options.api_key or os.environ.get("OPENAI_API_KEY", "")
    target = Target.of(url, options.model or "", api_key=key, is_stream=not options.no_stream)
    target = target if target.model else dataclasses.replace(target, model=served_model(target))
    if options.dataset == "trace" and not options.chat and tells_token_ids(target):
        # Later turns then hold the answers really given, and find them cached as the recorded ones did.
        target = dataclasses.replace(target, parameters={"return_token_ids": True})
    return target


def make_workload(options: argparse.Namespace, rate: str | None = None, count: int | None = None) -> Workload:
    """What the options ask for. rate, count: instead of those of the options."""
    rate = rate or options.rate
    has_times = options.dataset == "trace" and rate is None
    concurrency = options.concurrency
    if concurrency is None and rate is None and not has_times:
        concurrency = DEFAULT_CONCURRENCY
    stages = arrivals.parse_rate(rate) if rate else None

    def plan(seed: int) -> Iterable[PlannedRequest]:
        requests = _requests(options, seed, count or options.requests)
        if stages is None:
            return requests
        gaps = arrivals.unit_gaps(options.process, options.burstiness, seed)
        return arrivals.dated(requests, arrivals.arrival_times(stages, gaps))

    return Workload(plan, concurrency, 1.0 / options.speed if has_times else 1.0)


def _requests(options: argparse.Namespace, seed: int, count: int | None) -> Iterator[PlannedRequest]:
    maker = PromptMaker(options.chat, options.token_limit, seed)
    shape = datasets.Shape(
        options.input_len, options.output_len, options.spread, _levels(options.levels), options.turns, options.think,
        {"temperature": 0} if options.keep_eos else dict(datasets.FIXED_LENGTH),
    )  # fmt: skip
    generated = {
        "random": datasets.random_prompts,
        "prefix-tree": datasets.prefix_tree,
        "conversations": datasets.conversations,
    }
    if options.dataset in generated:
        yield from generated[options.dataset](shape, maker, count or DEFAULT_REQUESTS, seed)
        return
    counter = datasets.counter_of(options.tokenizer)
    if options.dataset == "trace":
        found = traces.read_trace(options.format, options.path, maker, count)
    elif options.dataset == "sharegpt":
        found = datasets.sharegpt(options.path, counter, shape, seed)
    else:
        found = datasets.custom_lines(options.path, counter, shape)
    for index, request in enumerate(found):
        if count is not None and index >= count:
            return
        yield request


def _levels(text: str) -> tuple[tuple[int, int], ...]:
    try:
        levels = tuple((int(size), int(branches)) for size, branches in (part.split("x") for part in text.split(",")))
    except ValueError:
        levels = ()
    if not levels or any(size < 1 or branches < 1 for size, branches in levels):
        raise ConfigError(f"--levels {text!r} is no tree.", remedy="Write TOKENSxBRANCHES, such as 512x4,256x4.")
    return levels


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for what contradicts itself or is out of bounds."""
    check_workload(options)
    check_bounds(options, {
        "rounds": (1, 1000), "warmup": (0, 1000), "timeout": (0.01, 86_400), "trial_s": (0.1, 86_400),
        "tolerance": (0.001, 1), "price": (0, 1e6),
    })  # fmt: skip
    if options.search and not options.slo:
        raise ConfigError("--search needs an objective.", remedy="Give --slo, such as ttft:p99=500ms.")
    if options.search and options.dataset not in ("random", "prefix-tree", "conversations"):
        raise ConfigError("--search makes its own requests.", remedy="Choose random, prefix-tree or conversations.")


def check_workload(options: argparse.Namespace) -> None:
    """The part of it that simulations need, too. Takes --trace for what it is short for."""
    if options.trace is not None:
        options.dataset, options.path = "trace", options.trace
    check_bounds(options, {
        "requests": (1, MAX_REQUESTS), "input_len": (1, 1 << 24), "output_len": (1, 1 << 24), "spread": (0, 0.99),
        "turns": (1, 1000), "think": (0, 86_400), "concurrency": (1, 20_000), "speed": (1e-3, 1e6),
        "burstiness": (0.01, 1000), "token_limit": (17, 1 << 24),
    })  # fmt: skip
    if options.dataset in ("sharegpt", "custom", "trace") and options.path is None:
        raise ConfigError(f"--dataset {options.dataset} needs a file.", remedy="Give --path.")
    if options.rate and options.concurrency:
        raise ConfigError("--rate and --concurrency contradict each other.", remedy="Give one of them.")


def check_bounds(options: argparse.Namespace, bounds: dict[str, tuple[float, float]]) -> None:
    """Raises ConfigError."""
    for name, (low, high) in bounds.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is {value:g}, out of its bounds.", remedy=f"Give {low:g} to {high:g}.")


def raise_file_limit() -> None:
    """A connection a request in flight needs more than the usual 1024 files."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
