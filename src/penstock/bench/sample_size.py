"""Percentiles that say how sure they are. Failures are infinitely late, and take part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Z_95: Final = 1.959964
SHARES: Final = (0.5, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Quantile:
    """value: nearest rank; inf where failures reach down to it. low, high: 95 % interval by order statistics.

    is_supported: the sample is large enough that the interval's upper end is not just the largest value.
    """

    share: float
    value: float
    low: float
    high: float
    is_supported: bool


@dataclass(frozen=True, slots=True)
class Distribution:
    """One metric over a run. mean, deviation: of the finite values; None without any."""

    count: int
    num_infinite: int
    mean: float | None
    deviation: float | None
    quantiles: tuple[Quantile, ...]

    def at(self, share: float) -> Quantile:
        return next(quantile for quantile in self.quantiles if quantile.share == share)


def distribution(values: npt.ArrayLike, shares: Sequence[float] = SHARES) -> Distribution:
    """values: any order, inf for failures."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    num_finite = int(np.searchsorted(ordered, math.inf))
    finite = ordered[:num_finite]
    mean = float(finite.mean()) if num_finite else None
    deviation = float(finite.std()) if num_finite else None
    quantiles = tuple(quantile(ordered, share) for share in shares) if len(ordered) else ()
    return Distribution(len(ordered), len(ordered) - num_finite, mean, deviation, quantiles)


def quantile(ordered: npt.NDArray[np.float64], share: float) -> Quantile:
    """ordered: ascending, not empty.

    The interval is between the order statistics at n p -+ 1.96 sqrt(n p (1 - p)) (the normal form of the exact
    binomial interval; Conover, Practical Nonparametric Statistics, 3.2).
    """
    count = len(ordered)
    rank = max(1, math.ceil(share * count - 1e-9))
    half = Z_95 * math.sqrt(count * share * (1 - share))
    low, high = math.floor(share * count - half), math.ceil(share * count + half)
    return Quantile(
        share,
        float(ordered[rank - 1]),
        float(ordered[max(1, low) - 1]),
        float(ordered[min(count, high) - 1]),
        is_supported=low >= 1 and high < count,
    )


def required_count(share: float) -> int:
    """The smallest sample whose quantile at `share` is supported."""
    count = 2
    while True:
        half = Z_95 * math.sqrt(count * share * (1 - share))
        if math.floor(share * count - half) >= 1 and math.ceil(share * count + half) < count:
            return count
        count += 1


def is_shown(num_late: int, count: int, share: float, confidence: float = 0.99) -> bool:
    """Whether `num_late` of `count` prove, with that confidence, that at least `share` of all requests are in time.

    Exact: the chance of so few late ones, were exactly 1 - share of all requests late, is at most 1 - confidence
    (MLPerf's early stopping with no tolerance).
    """
    return late_probability(num_late, count, share) <= 1 - confidence


def late_probability(num_late: int, count: int, share: float) -> float:
    """P(at most num_late late of count), each late with probability 1 - share."""
    late = 1 - share
    total = 0.0
    for k in range(num_late + 1):
        log = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        total += math.exp(log + k * math.log(late) + (count - k) * math.log(share))
        if k > count * late and total > 0.5:
            break
    return min(1.0, total)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95 % interval of the mean of a few independent values."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, -math.inf, math.inf
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = _T_95[min(count - 1, len(_T_95)) - 1] * deviation / math.sqrt(count)
    return mean, mean - half, mean + half


# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; the last serves all further ones.
_T_95: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
