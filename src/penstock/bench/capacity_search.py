"""The highest rate at which a server keeps an SLO: doubling to find a bracket, then bisection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from penstock.bench.metrics import Summary

MAX_DOUBLINGS: Final = 24
MIN_RATE: Final = 1e-3


@dataclass(frozen=True)
class Trial:
    """One run of the search. is_kept: the SLO held, and the run counts."""

    rate: float
    summary: Summary

    @property
    def is_kept(self) -> bool:
        return not self.summary.void and all(verdict.is_kept for verdict in self.summary.slo)


@dataclass
class SearchResult:
    """kept: the highest rate that held the SLO (0: none did). broken: the lowest that did not (inf: none found)."""

    kept: float
    broken: float
    trials: list[Trial] = field(default_factory=list)
    stopped: str = ""


async def search_capacity(
    trial: Callable[[float], Awaitable[Summary]], start_rate: float, tolerance: float = 0.03
) -> SearchResult:
    """trial: runs at a rate, with the SLO judged. Ends when broken / kept <= 1 + tolerance, or when a run is void."""
    result = SearchResult(0.0, float("inf"))
    rate = start_rate
    for _ in range(2 * MAX_DOUBLINGS):
        tried = Trial(rate, await trial(rate))
        result.trials.append(tried)
        if tried.summary.void:
            result.stopped = f"at {rate:g} requests/s {tried.summary.void[0]}"
            break
        if tried.is_kept:
            result.kept = rate
        else:
            result.broken = rate
        if result.kept and result.broken <= result.kept * (1 + tolerance):
            break
        if result.broken == float("inf"):
            rate *= 2
        elif not result.kept:
            rate /= 2
        else:
            rate = (result.kept * result.broken) ** 0.5
        if rate < MIN_RATE:
            result.stopped = "no rate keeps this SLO"
            break
    return result
