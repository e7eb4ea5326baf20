"""Tries settings and numbers of replicas in the simulator, and picks the cheapest that keeps the SLO."""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from penstock.advisor.quality import LOSSES, loss_line
from penstock.bench.load_run import RunRecord
from penstock.bench.measure import Workload
from penstock.bench.metrics import Summary, summarise
from penstock.bench.plan import PlannedRequest
from penstock.bench.report import cost_per_million
from penstock.bench.sample_size import required_count
from penstock.bench.simulator import SimulatedEngine, run_simulation
from penstock.bench.slo import Slo
from penstock.bench.step_time import ScaledStepTime, StepTime
from penstock.config.resolve import EngineOptions, with_limits

_DEFAULTS: Final = with_limits(EngineOptions())
_SEQUENCES: Final = (8, 16, 32, 64, 128)
_BUDGETS: Final = (256, 512, 1024)
CONFIRMING_DRAWS: Final = 8  # at least; more where as many requests cannot speak of a p99
MAX_DRAWS: Final = 64
MAX_CONFIRMED: Final = 3
_SPEEDUPS: Final = (2, 4, 8, 16, 32, 64)
_LATENCIES: Final = {"TTFT": "ttft", "ITL": "itl", "E2E": "e2e"}


@dataclass(frozen=True)
class Platform:
    """One machine with one model on it. name: for the reader. price_per_hour: dollars.

    quantization: how the weights were rounded, as in --quantization; "" for not. is_measured: or known by limits only.
    num_host_blocks: of the KV cache's host tier; block_copy_s: of one of them, either way.
    """

    name: str
    step_time: StepTime
    num_blocks: int
    block_size: int
    max_model_len: int
    price_per_hour: float = 0.0
    quantization: str = ""
    is_measured: bool = True
    num_host_blocks: int = 0
    block_copy_s: float = 0.0

    def scaled(self, factor: float) -> Platform:
        """With steps that take `factor` times as long."""
        return replace(self, step_time=ScaledStepTime(self.step_time, factor))


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

    @property
    def num_changes(self) -> int:
        """Settings that are not a server's defaults."""
        names = ("max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching")
        return sum(getattr(self, name) != getattr(_DEFAULTS, name) for name in names)

    def __str__(self) -> str:
        cache = "" if self.enable_prefix_caching else " --no-enable-prefix-caching"
        return (
            f"{self.num_replicas} x {self.platform.name}: --max-num-seqs {self.max_num_seqs} "
            f"--max-num-batched-tokens {self.max_num_batched_tokens}{cache}"
        )


@dataclass(frozen=True)
class Prediction:
    """What the simulator says of a candidate. busy_share: of the busiest replica's device.

    summary: of all draws of the workload as one sample; draws: of each, where there were several.
    """

    candidate: Candidate
    summary: Summary
    busy_share: float
    draws: tuple[Summary, ...] = ()

    @property
    def keeps_slo(self) -> bool:
        return self.summary.num_failed == 0 and all(verdict.is_kept for verdict in self.summary.slo)

    def interval_ms(self, name: str, share: float) -> tuple[float, float, float]:
        """(value, low, high): what one run of the workload may show. Within it lie all draws, and the sampling interval
        of all together; the step model's error comes on top on either side."""
        metric = _LATENCIES[name]
        at = self.summary.latency[metric].at(share)
        seen = [at.low, at.high, *(draw.latency[metric].at(share).value for draw in self.draws)]
        error = self.candidate.platform.step_time.error
        return at.value * 1e3, min(seen) * (1 - error) * 1e3, max(seen) * (1 + error) * 1e3


@dataclass
class Advice:
    """best: the cheapest that keeps the SLO; None when none did. reasons: in words, each from a prediction.

    replicas: how many it takes if steps are as much quicker, or slower, as the step model is usually off; None as the
    second: more than were allowed.
    """

    best: Prediction | None
    tried: list[Prediction] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    replicas: tuple[int, int | None] = (0, None)


def predict(candidate: Candidate, workload: Workload, slo: Slo, seed: int, num_draws: int = 1) -> Prediction:
    """Simulates every replica with its share of the conversations. num_draws: of the workload, one sample of all.

    Raises ConfigError.
    """
    engine = _engine(candidate)
    records, draws, busy, offset_s = list[RunRecord](), list[Summary](), 0.0, 0.0
    for draw in range(num_draws):
        runs = []
        for replica in range(candidate.num_replicas):
            share = Workload(_share_of(workload, replica, candidate.num_replicas), workload.concurrency, workload.scale)
            runs.append(run_simulation(engine, candidate.platform.step_time, share, seed + draw))
        busy = max(busy, *(found.busy_share for found in runs))
        if num_draws > 1:
            draws.append(summarise(_merged([found.record for found in runs]), slo))
        for found in runs:
            _shift(found.record, offset_s)
            records.append(found.record)
        offset_s = max(record.end_s for record in records) - records[0].start_s
    return Prediction(candidate, summarise(_merged(records), slo), busy, tuple(draws))


def _num_draws(summary: Summary) -> int:
    """So many that all together are enough requests for a p99."""
    wanted = math.ceil(required_count(0.99) / max(1, summary.num_attempted))
    return min(MAX_DRAWS, max(CONFIRMING_DRAWS, wanted))


def _shift(record: RunRecord, by_s: float) -> None:
    """Moves a run on its clock; every simulated one starts at the same moment."""
    record.start_s += by_s
    record.end_s += by_s
    for seen in record.observations if by_s else ():
        for name in ("intended_s", "started_s", "sent_s", "ended_s"):
            setattr(seen, name, getattr(seen, name) + by_s)
        seen.chunk_s = array("d", [moment_s + by_s for moment_s in seen.chunk_s])


def advise(platforms: Sequence[Platform], workload: Workload, slo: Slo, seed: int, max_replicas: int) -> Advice:
    """Fewest replicas first, then settings. Raises ConfigError."""
    advice = Advice(None)
    confirmed = []
    for platform in platforms:
        for num_replicas in _growing(max_replicas):
            start = Candidate(platform, num_replicas, _DEFAULTS.max_num_seqs, _DEFAULTS.max_num_batched_tokens)
            tried = [predict(start, workload, slo, seed)]
            # Settings seldom help twofold: when the SLO is missed by far, more replicas are tried first.
            if worst_ratio(tried[0]) <= 4 or num_replicas == max_replicas:
                tried += [predict(other, workload, slo, seed) for other in _variants(start)]
            advice.tried += tried
            if found := _confirmed(tried, workload, slo, seed):
                confirmed.append(found)
                break
    if confirmed:
        advice.best = min(confirmed, key=_preference)
        advice.replicas = _replica_interval(advice.best, workload, slo, seed, max_replicas)
    advice.reasons = list(_reasons(advice)) + list(_faster_machine(advice, workload, slo, seed))
    return advice


def _confirmed(tried: Sequence[Prediction], workload: Workload, slo: Slo, seed: int) -> Prediction | None:
    """The best that also keeps the SLO in several draws: what one kept by luck, several do not."""
    kept = sorted((found for found in tried if found.keeps_slo), key=_preference)
    for found in kept[:MAX_CONFIRMED]:
        several = predict(found.candidate, workload, slo, seed, _num_draws(found.summary))
        if several.keeps_slo:
            return several
    return None


def _preference(found: Prediction) -> tuple[float, int, float, float, int]:
    """Money first, then replicas, then the answers' quality, then the room that is left below the limits, in tenths of
    them: for less, no setting is changed."""
    loss = LOSSES.get(found.candidate.platform.quantization)
    lost = loss.perplexity if loss is not None else 1.0
    candidate = found.candidate
    return candidate.price_per_hour, candidate.num_replicas, lost, round(worst_ratio(found), 1), candidate.num_changes


def _replica_interval(
    best: Prediction, workload: Workload, slo: Slo, seed: int, max_replicas: int
) -> tuple[int, int | None]:
    """Fewest replicas with the best settings on machines that are off by the step model's error, to either side."""
    error = best.candidate.platform.step_time.error
    quick, slow = (best.candidate.platform.scaled(1 + sign * error) for sign in (-1, 1))
    count = best.candidate.num_replicas
    fewest = _fewest(replace(best.candidate, platform=quick), workload, slo, seed, 1, count)
    most = _fewest(replace(best.candidate, platform=slow), workload, slo, seed, count, max_replicas)
    return fewest or count, most


def _fewest(candidate: Candidate, workload: Workload, slo: Slo, seed: int, low: int, high: int) -> int | None:
    """By bisection: more replicas never do worse. None when `high` are too few."""
    if not predict(replace(candidate, num_replicas=high), workload, slo, seed).keeps_slo:
        return None
    while low < high:
        middle = (low + high) // 2
        if predict(replace(candidate, num_replicas=middle), workload, slo, seed).keeps_slo:
            high = middle
        else:
            low = middle + 1
    return high


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
    engine = SimulatedEngine.of(options, platform.num_blocks, platform.block_size, platform.max_model_len)
    return engine.with_host_tier(platform.num_host_blocks, platform.block_copy_s)


def _share_of(workload: Workload, replica: int, num_replicas: int) -> Callable[[int], Iterable[PlannedRequest]]:
    def plan(seed: int) -> Iterable[PlannedRequest]:
        for request in workload.plan(seed):
            key = request.session or str(request.index)
            if zlib.crc32(key.encode()) % num_replicas == replica:
                yield request

    return plan


def _merged(records: Sequence[RunRecord]) -> RunRecord:
    """All replicas as one service."""
    observations = [seen for record in records for seen in record.observations]
    end_s = max(record.end_s for record in records)
    num_skipped = sum(record.num_skipped for record in records)
    return RunRecord(observations, records[0].start_s, end_s, array("d"), num_skipped=num_skipped)


def worst_ratio(found: Prediction) -> float:
    """The worst limit's value over what it allows."""
    return max((verdict.value_s / verdict.limit.limit_s for verdict in found.summary.slo), default=0.0)


def _reasons(advice: Advice) -> Iterator[str]:
    best = advice.best
    if best is None:
        closest = min(advice.tried, key=worst_ratio)
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
        closest = min(fewer, key=worst_ratio)
        missed = f"{worst_ratio(closest):.1f} times over"
        yield f"With {closest.candidate.num_replicas} replicas the worst limit is missed {missed}."
    yield f"The busiest replica computes {best.busy_share:.0%} of the time."
    yield from _formats(advice, best)


def _formats(advice: Advice, best: Prediction) -> Iterator[str]:
    """What the other weight formats that were given would do, and what rounding costs."""
    if line := loss_line(best.candidate.platform.quantization):
        yield f"{line}."
    for platform in {found.candidate.platform.name: found.candidate.platform for found in advice.tried}.values():
        if platform is best.candidate.platform:
            continue
        kept = [found for found in advice.tried if found.candidate.platform is platform and found.keeps_slo]
        if not kept:
            yield f"{platform.name} keeps the SLO with none of the settings and numbers of replicas tried."
            continue
        other = min(kept, key=_preference)
        at = other.summary.latency["ttft"].at(0.99).value
        line = (
            f"{platform.name} needs {other.candidate.num_replicas} replicas, with a TTFT p99 of {at * 1e3:.0f} ms and "
            f"the device busy {other.busy_share:.0%} of the time"
        )
        loss = loss_line(platform.quantization)
        yield f"{line}; {loss}." if loss else f"{line}."


def _faster_machine(advice: Advice, workload: Workload, slo: Slo, seed: int) -> Iterator[str]:
    """Where nothing keeps the SLO: how fast a machine would have to be for one replica to keep it."""
    if advice.best is not None:
        return
    candidate = min(advice.tried, key=worst_ratio).candidate
    for times in _SPEEDUPS:
        faster = replace(candidate, platform=candidate.platform.scaled(1 / times), num_replicas=1)
        if predict(faster, workload, slo, seed).keeps_slo:
            yield (
                f"One replica of a machine whose steps are {times} times as fast would keep it (the same simulation "
                f"with steps of 1/{times} the time): an accelerator, or fewer bits a weight, is what to look for."
            )
            return
    yield f"A machine {_SPEEDUPS[-1]} times as fast would not keep it either: the limit is the front end's or the rate."


def cost_lines(best: Prediction) -> list[str]:
    """Dollars, with the formula."""
    price = best.candidate.price_per_hour
    if not price:
        return []
    rate = best.summary.output_token_rate
    cost = cost_per_million(price, rate)
    busy = max(best.busy_share, 1e-6)
    return [
        f"${cost:.3f} per million output tokens = ${price:g}/h / ({rate:.1f} tokens/s x 3600 s) x 1e6, at this load",
        f"A hosted API of the same model is cheaper below that price at this load, and below ${cost * busy:.3f} if "
        f"{'a replica' if best.candidate.num_replicas == 1 else 'the replicas'} were kept busy (now {busy:.0%}).",
    ]
