"""Tries settings and numbers of replicas in the simulator, and picks the cheapest that keeps the SLO."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from penstock.bench.load_run import RunRecord
from penstock.bench.measure import Workload
from penstock.bench.metrics import Summary, summarise
from penstock.bench.plan import PlannedRequest
from penstock.bench.report import cost_per_million
from penstock.bench.simulator import SimulatedEngine, run_simulation
from penstock.bench.slo import Slo
from penstock.bench.step_time import StepTime
from penstock.config.resolve import EngineOptions

_SEQUENCES: Final = (8, 16, 32, 64, 128)
_BUDGETS: Final = (256, 512, 1024)
_LATENCIES: Final = {"TTFT": "ttft", "ITL": "itl", "E2E": "e2e"}


@dataclass(frozen=True)
class Platform:
    """One machine with one model on it. name: for the reader. price_per_hour: dollars."""

    name: str
    step_time: StepTime
    num_blocks: int
    block_size: int
    max_model_len: int
    price_per_hour: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A way to run the workload."""

    platform: Platform
    num_replicas: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True

    @property
    def price_per_hour(self) -> float:
        return self.platform.price_per_hour * self.num_replicas

    def __str__(self) -> str:
        cache = "" if self.enable_prefix_caching else " --no-enable-prefix-caching"
        return (
            f"{self.num_replicas} x {self.platform.name}: --max-num-seqs {self.max_num_seqs} "
            f"--max-num-batched-tokens {self.max_num_batched_tokens}{cache}"
        )


@dataclass(frozen=True)
class Prediction:
    """What the simulator says of a candidate. busy_share: of the busiest replica's device."""

    candidate: Candidate
    summary: Summary
    busy_share: float

    @property
    def keeps_slo(self) -> bool:
        return self.summary.num_failed == 0 and all(verdict.is_kept for verdict in self.summary.slo)

    def interval_ms(self, name: str, share: float) -> tuple[float, float, float]:
        """(value, low, high): the sampling interval, widened by the step model's error on either side."""
        at = self.summary.latency[_LATENCIES[name]].at(share)
        error = self.candidate.platform.step_time.error
        return at.value * 1e3, at.low * (1 - error) * 1e3, at.high * (1 + error) * 1e3


@dataclass
class Advice:
    """best: the cheapest that keeps the SLO; None when none did. reasons: in words, each from a prediction."""

    best: Prediction | None
    tried: list[Prediction] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def predict(candidate: Candidate, workload: Workload, slo: Slo, seed: int) -> Prediction:
    """Simulates every replica with its share of the conversations. Raises ConfigError."""
    engine = _engine(candidate)
    records, busy = [], 0.0
    for replica in range(candidate.num_replicas):
        share = Workload(_share_of(workload, replica, candidate.num_replicas), workload.concurrency, workload.scale)
        found = run_simulation(engine, candidate.platform.step_time, share, seed)
        records.append(found.record)
        busy = max(busy, found.busy_share)
    return Prediction(candidate, summarise(_merged(records), slo), busy)


def advise(platforms: Sequence[Platform], workload: Workload, slo: Slo, seed: int, max_replicas: int) -> Advice:
    """Fewest replicas first, then settings. Raises ConfigError."""
    advice = Advice(None)
    for platform in platforms:
        for num_replicas in _growing(max_replicas):
            start = Candidate(platform, num_replicas, 64, 512)
            first = predict(start, workload, slo, seed)
            advice.tried.append(first)
            # Settings seldom help twofold: when the SLO is missed by far, more replicas are tried first.
            if _worst_ratio(first) > 4 and num_replicas < max_replicas:
                continue
            advice.tried += [predict(other, workload, slo, seed) for other in _variants(start)]
            if any(found.keeps_slo and found.candidate.num_replicas == num_replicas
                   and found.candidate.platform is platform for found in advice.tried):  # fmt: skip
                break
    kept = [found for found in advice.tried if found.keeps_slo]
    if kept:
        advice.best = min(
            kept, key=lambda found: (found.candidate.price_per_hour, found.candidate.num_replicas, _worst_ratio(found))
        )
    advice.reasons = list(_reasons(advice))
    return advice


def _growing(limit: int) -> Iterator[int]:
    count = 1
    while count < limit:
        yield count
        count += max(1, count // 2)
    yield limit


def _variants(start: Candidate) -> Iterator[Candidate]:
    for max_num_seqs in _SEQUENCES:
        for budget in _BUDGETS:
            if budget >= max_num_seqs and (max_num_seqs, budget) != (start.max_num_seqs, start.max_num_batched_tokens):
                yield Candidate(start.platform, start.num_replicas, max_num_seqs, budget)
    yield Candidate(
        start.platform,
        start.num_replicas,
        start.max_num_seqs,
        start.max_num_batched_tokens,
        enable_prefix_caching=False,
    )


def _engine(candidate: Candidate) -> SimulatedEngine:
    platform = candidate.platform
    options = EngineOptions(
        max_num_seqs=candidate.max_num_seqs,
        max_num_batched_tokens=candidate.max_num_batched_tokens,
        enable_prefix_caching=candidate.enable_prefix_caching,
    )
    return SimulatedEngine.of(options, platform.num_blocks, platform.block_size, platform.max_model_len)


def _share_of(workload: Workload, replica: int, num_replicas: int) -> Callable[[int], Iterable[PlannedRequest]]:
    def plan(seed: int) -> Iterable[PlannedRequest]:
        for request in workload.plan(seed):
            key = request.session or str(request.index)
            if zlib.crc32(key.encode()) % num_replicas == replica:
                yield request

    return plan


def _merged(records: Sequence[RunRecord]) -> RunRecord:
    """All replicas as one service; their simulated clocks start alike."""
    observations = [seen for record in records for seen in record.observations]
    end_s = max(record.end_s for record in records)
    num_skipped = sum(record.num_skipped for record in records)
    return RunRecord(observations, records[0].start_s, end_s, array("d"), num_skipped=num_skipped)


def _worst_ratio(found: Prediction) -> float:
    """The worst limit's value over what it allows."""
    return max((verdict.value_s / verdict.limit.limit_s for verdict in found.summary.slo), default=0.0)


def _reasons(advice: Advice) -> Iterator[str]:
    best = advice.best
    if best is None:
        closest = min(advice.tried, key=_worst_ratio)
        worst = max(closest.summary.slo, key=lambda verdict: verdict.value_s / verdict.limit.limit_s)
        yield f"Nothing that was tried keeps the SLO; the closest is {closest.candidate}, whose {worst.limit.metric} is"
        yield f"{worst.value_s * 1e3:.0f} ms at p{worst.limit.share * 100:g}, {worst.limit.limit_s * 1e3:g} ms allowed."
        return
    same = [found for found in advice.tried if found.candidate.num_replicas == best.candidate.num_replicas]
    uncached = [found for found in same if not found.candidate.enable_prefix_caching]
    if uncached and uncached[0].candidate.platform is best.candidate.platform:
        with_cache, without = (
            best.summary.latency["ttft"].at(0.5).value,
            uncached[0].summary.latency["ttft"].at(0.5).value,
        )
        hits = (best.summary.cached_tokens or 0) / max(1, best.summary.prompt_tokens)
        yield (
            f"The prefix cache holds {hits:.0%} of the prompt tokens; without it the median TTFT is "
            f"{without * 1e3:.0f} ms instead of {with_cache * 1e3:.0f} ms."
        )
    fewer = [found for found in advice.tried if found.candidate.num_replicas < best.candidate.num_replicas
             and found.candidate.platform is best.candidate.platform]  # fmt: skip
    if fewer:
        closest = min(fewer, key=_worst_ratio)
        missed = f"{_worst_ratio(closest):.1f} times over"
        yield f"With {closest.candidate.num_replicas} replicas the worst limit is missed {missed}."
    yield f"The busiest replica computes {best.busy_share:.0%} of the time."


def cost_lines(best: Prediction) -> list[str]:
    """Dollars, with the formula."""
    price = best.candidate.price_per_hour
    if not price:
        return []
    rate = best.summary.output_token_rate
    cost = cost_per_million(price, rate)
    return [
        f"${cost:.3f} per million output tokens = ${price:g}/h / ({rate:.1f} tokens/s x 3600 s) x 1e6, at this load"
    ]
