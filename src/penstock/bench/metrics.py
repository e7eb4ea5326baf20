"""From observations to figures. Every figure's definition is in DEFINITIONS, and is printed with it.

What makes these figures honest: times start at the intended send; a request that failed is infinitely late in every
percentile; a percentile that its sample cannot support is marked; a run that the client itself disturbed is void.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from penstock.bench.load_client import CLIENT_LIMIT
from penstock.bench.load_run import RunRecord
from penstock.bench.observation import Observation
from penstock.bench.sample_size import SHARES, Distribution, distribution, is_shown
from penstock.bench.slo import Limit, Slo

MAX_LAG_S: Final = 0.010
MAX_LAG_OF_TTFT: Final = 0.05
STEADY_FROM: Final = 0.1

DEFINITIONS: Final[dict[str, str]] = {
    "ttft": "per request: intended send to the first chunk with output (text, reasoning, tool call or token ids)",
    "tpot": "per request: (last token - first chunk with output) / (output tokens after the first chunk)",
    "itl": "per chunk: gap between successive chunks with output, over all requests",
    "itl_token": "per token: a gap before a chunk of k tokens counts as k gaps of a k-th of it, over all requests",
    "e2e": "per request: intended send to the end of the response ([DONE] of a stream)",
    "send_lag": "per request: intended send to the client's turning to it; the client's own fault; inside ttft and e2e",
    "success": "status 200, a finish_reason, [DONE] of a stream, no error event; all else is a failure: inf in every "
    "percentile of ttft, tpot, e2e, and one infinite gap in itl",
    "percentile": "nearest rank with a 95 % interval by order statistics; '?' where the sample is too small for it",
    "throughput": "full: of good requests, over first intended send to last end; steady: tokens by their arrival, over "
    "the time of sending without its first tenth and without the drain",
    "goodput": "requests that keep every limit of the SLO; its share is of all attempted, cancelled ones left out",
    "vllm_keys": "keys like mean_ttft_ms follow vllm bench serve: good requests only, from the actual send, chunk gaps",
}


@dataclass(slots=True)
class Outcome:
    """One request, concluded; seconds, inf where it failed. tpot: None for answers of one token."""

    ttft: float
    e2e: float
    tpot: float | None
    gaps: list[float]
    num_tokens: int
    is_success: bool


@dataclass(slots=True)
class LimitVerdict:
    """One limit of the SLO. is_shown: so few late ones prove it with 99 % confidence (for limits per request)."""

    limit: Limit
    value_s: float
    is_kept: bool
    is_shown: bool


@dataclass(slots=True)
class Summary:
    """A run's figures. Seconds; rates per second. void: reasons why this run proves nothing; empty for a good one.

    refusals: what the server said of the first failure of each kind, where it said something.
    """

    num_attempted: int
    num_succeeded: int
    num_failed: int
    num_cancelled: int
    num_skipped: int
    failures: dict[str, int]
    refusals: dict[str, str]
    void: list[str]
    warnings: list[str]
    duration_s: float
    offered_rate: float
    request_rate: float
    output_token_rate: float
    steady_output_token_rate: float | None
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    tokens_per_chunk: float | None
    latency: dict[str, Distribution]
    send_lag: Distribution
    loop_lag: Distribution
    client_cpu_share: float
    goodput_rate: float | None = None
    goodput_share: float | None = None
    slo: list[LimitVerdict] = field(default_factory=list)
    max_in_flight: int = 0


def conclude(seen: Observation) -> Outcome:
    """What the user of one request would say of it."""
    if not seen.is_success:
        return Outcome(math.inf, math.inf, math.inf, [math.inf], 0, is_success=False)
    num_tokens = tokens_of(seen)
    chunks = seen.chunk_s
    num_after = num_tokens - max(1, seen.chunk_tokens[0])
    tpot = (seen.last_token_s - chunks[0]) / num_after if num_after > 0 else None
    gaps = [after - before for before, after in itertools.pairwise(chunks)]
    return Outcome(chunks[0] - seen.intended_s, seen.ended_s - seen.intended_s, tpot, gaps, num_tokens, is_success=True)


def tokens_of(seen: Observation) -> int:
    """Output tokens: as `usage` says, else as the chunks say, else one a chunk."""
    if seen.output_tokens >= 0:
        return seen.output_tokens
    return sum(max(1, num_tokens) for num_tokens in seen.chunk_tokens)


def token_gaps(seen: Observation, outcome: Outcome) -> Iterable[float]:
    """Per-token gaps. Chunks that do not say how many tokens they hold share evenly in what is left of the total."""
    if not outcome.is_success:
        return outcome.gaps
    known = list(seen.chunk_tokens)
    num_silent = known.count(0)
    if num_silent:
        share, extra = divmod(max(num_silent, outcome.num_tokens - sum(known)), num_silent)
        for index, count in enumerate(known):
            if count == 0:
                known[index] = share + (extra > 0)
                extra -= 1
    counts = known[1:]
    return itertools.chain.from_iterable(
        itertools.repeat(gap / count, count) for gap, count in zip(outcome.gaps, counts, strict=True)
    )


def summarise(run: RunRecord, slo: Slo = (), shares: Sequence[float] = SHARES) -> Summary:
    """Every figure of a run."""
    counted = [seen for seen in run.observations if not seen.is_cancelled]
    outcomes = [conclude(seen) for seen in counted]
    good = [outcome for outcome in outcomes if outcome.is_success]
    sent = [seen.intended_s for seen in run.observations]
    duration_s = max(run.end_s - min(sent, default=run.start_s), 1e-9)
    latency = _latencies(counted, outcomes, shares)
    offered_s = max(sent, default=0.0) - min(sent, default=0.0)
    num_chunks = sum(len(seen.chunk_s) for seen in counted if seen.is_success)
    cached = [seen.cached_tokens for seen in counted if seen.cached_tokens >= 0]
    output_tokens = sum(outcome.num_tokens for outcome in good)
    summary = Summary(
        num_attempted=len(run.observations),
        num_succeeded=len(good),
        num_failed=len(counted) - len(good),
        num_cancelled=len(run.observations) - len(counted),
        num_skipped=run.num_skipped,
        failures=dict(collections.Counter(seen.failure for seen in counted if seen.failure)),
        refusals={seen.failure: seen.refusal for seen in reversed(counted) if seen.failure and seen.refusal},
        void=[],
        warnings=[],
        duration_s=duration_s,
        offered_rate=(len(sent) - 1) / offered_s if offered_s > 0 else math.inf,
        request_rate=len(good) / duration_s,
        output_token_rate=output_tokens / duration_s,
        steady_output_token_rate=_steady_rate(counted),
        prompt_tokens=sum(max(0, seen.prompt_tokens) for seen in counted if seen.is_success),
        cached_tokens=sum(cached) if cached else None,
        output_tokens=output_tokens,
        tokens_per_chunk=output_tokens / num_chunks if num_chunks else None,
        latency=latency,
        send_lag=distribution([seen.started_s - seen.intended_s for seen in run.observations], shares),
        loop_lag=distribution(run.loop_lags_s, shares),
        client_cpu_share=run.client_cpu_s / duration_s,
        max_in_flight=_max_in_flight(run.observations),
    )
    _judge(summary, outcomes, slo)
    summary.void = void_reasons(summary, slo)
    summary.warnings = _warnings(summary, counted)
    return summary


def _latencies(counted: list[Observation], outcomes: list[Outcome], shares: Sequence[float]) -> dict[str, Distribution]:
    per_token = itertools.chain.from_iterable(
        token_gaps(seen, outcome) for seen, outcome in zip(counted, outcomes, strict=True)
    )
    return {
        "ttft": distribution([outcome.ttft for outcome in outcomes], shares),
        "tpot": distribution([outcome.tpot for outcome in outcomes if outcome.tpot is not None], shares),
        "itl": distribution(np.fromiter((gap for outcome in outcomes for gap in outcome.gaps), np.float64), shares),
        "itl_token": distribution(np.fromiter(per_token, np.float64), shares),
        "e2e": distribution([outcome.e2e for outcome in outcomes], shares),
    }


def _steady_rate(counted: list[Observation]) -> float | None:
    """Output tokens a second without start and drain; None when sending took no time."""
    sent = [seen.intended_s for seen in counted]
    if not sent or max(sent) <= min(sent):
        return None
    end_s = max(sent)
    start_s = min(sent) + STEADY_FROM * (end_s - min(sent))
    num_tokens = 0.0
    for seen in counted:
        if seen.is_success:
            chunks = np.frombuffer(seen.chunk_s)
            inside = int(np.count_nonzero((chunks >= start_s) & (chunks < end_s)))
            num_tokens += inside * tokens_of(seen) / len(chunks)
    return num_tokens / (end_s - start_s)


def _max_in_flight(observations: list[Observation]) -> int:
    if not observations:
        return 0
    starts = np.sort([seen.started_s for seen in observations])
    ends = np.sort([seen.ended_s for seen in observations])
    return int((np.arange(1, len(starts) + 1) - np.searchsorted(ends, starts, side="right")).max())


def _judge(summary: Summary, outcomes: list[Outcome], slo: Slo) -> None:
    """Fills in the SLO's verdicts and the goodput."""
    if not slo or not outcomes:
        return
    for limit in slo:
        values = summary.latency[limit.metric]
        at = distribution_at(outcomes, limit)
        per_request = {"ttft", "tpot", "e2e"}
        late = sum(value > limit.limit_s for value in _values(outcomes, limit.metric))
        shown = limit.metric in per_request and is_shown(late, values.count, limit.share)
        summary.slo.append(LimitVerdict(limit, at, at <= limit.limit_s, shown))
    num_good = sum(_keeps(outcome, slo) for outcome in outcomes)
    summary.goodput_rate = num_good / summary.duration_s
    summary.goodput_share = num_good / len(outcomes)


def _values(outcomes: list[Outcome], metric: str) -> Iterable[float]:
    if metric == "itl":
        return (gap for outcome in outcomes for gap in outcome.gaps)
    return (value for outcome in outcomes if (value := getattr(outcome, metric)) is not None)


def distribution_at(outcomes: list[Outcome], limit: Limit) -> float:
    """The value at the limit's percentile; 0 where there are none (answers of one token have no gaps)."""
    found = distribution(np.fromiter(_values(outcomes, limit.metric), np.float64), (limit.share,))
    return found.quantiles[0].value if found.count else 0.0


def _keeps(outcome: Outcome, slo: Slo) -> bool:
    """Whether one request keeps every limit; of itl, its own gaps at the limit's percentile."""
    if not outcome.is_success:
        return False
    for limit in slo:
        value = distribution_at([outcome], limit) if limit.metric == "itl" else getattr(outcome, limit.metric) or 0.0
        if value > limit.limit_s:
            return False
    return True


def void_reasons(summary: Summary, slo: Slo) -> list[str]:
    """Why the client, not the server, made these figures."""
    ttft_limits = [limit.limit_s for limit in slo if limit.metric == "ttft"]
    allowed_s = max(MAX_LAG_S, MAX_LAG_OF_TTFT * min(ttft_limits)) if ttft_limits else MAX_LAG_S
    reasons = []
    for name, lags in (("send lag", summary.send_lag), ("event loop lag", summary.loop_lag)):
        if lags.count and (lag_s := lags.at(0.99).value) > allowed_s:
            reasons.append(f"the client's {name} was {lag_s * 1e3:.1f} ms at p99, more than {allowed_s * 1e3:g} ms")
    if summary.failures.get(CLIENT_LIMIT):
        reasons.append("the client reached its limit of requests in flight")
    if any(failure.endswith("OSError") for failure in summary.failures):
        reasons.append("the client could not open sockets (see ulimit -n)")
    return reasons


def _warnings(summary: Summary, counted: list[Observation]) -> list[str]:
    warnings = []
    good = [seen for seen in counted if seen.is_success]
    other = sum(tokens_of(seen) != seen.request.output_tokens for seen in good)
    if other:
        warnings.append(f"{other} of {len(good)} answers had another length than asked for: compare servers with care")
    if any(seen.output_tokens < 0 for seen in good):
        warnings.append("the server sent no usage: output tokens are counted by chunks")
    planned = sum(seen.request.prompt_tokens for seen in good if seen.prompt_tokens >= 0)
    if planned and abs(summary.prompt_tokens / planned - 1) > 0.1:
        warnings.append(f"prompts had {summary.prompt_tokens / planned:.2f} times the tokens planned")
    if summary.num_skipped:
        warnings.append(f"{summary.num_skipped} turns were not sent: an earlier turn of their conversation failed")
    if summary.client_cpu_share > 0.5:
        warnings.append(f"the client used {summary.client_cpu_share:.0%} of a core")
    return warnings
