"""When requests arrive: Poisson, gamma or constant gaps, at a rate that may change over time."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from penstock.base.errors import ConfigError
from penstock.bench.plan import PlannedRequest

MAX_RATE: Final = 100_000.0
_STAGE = re.compile(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?(?::(\d+(?:\.\d+)?))?")


@dataclass(frozen=True, slots=True)
class Stage:
    """Requests a second, from `first` linearly to `last` within `seconds` (inf: for good)."""

    first: float
    last: float
    seconds: float


def parse_rate(text: str) -> tuple[Stage, ...]:
    """Of "5" (for good), or stages "2:30,2-8:60,8:30" (rate, or ramp, : seconds). Raises ConfigError."""
    stages = []
    for part in text.split(","):
        match = _STAGE.fullmatch(part.strip())
        if match is None:
            raise _bad_rate(text)
        first = float(match[1])
        stages.append(Stage(first, float(match[2] or first), float(match[3] or math.inf)))
    for stage in stages:
        ends = math.isfinite(stage.seconds)
        if not 0 <= min(stage.first, stage.last) <= max(stage.first, stage.last) <= MAX_RATE:
            raise _bad_rate(text)
        if (not ends and (stage is not stages[-1] or stage.first != stage.last or stage.first == 0)) or (
            ends and stage.seconds <= 0
        ):
            raise _bad_rate(text)
    return tuple(stages)


def _bad_rate(text: str) -> ConfigError:
    return ConfigError(
        f"{text!r} is no request rate.",
        remedy=f"Give 5, or stages such as 2:30,2-8:60,8:30 (requests a second : seconds); at most {MAX_RATE:g}.",
        param="rate",
    )


def unit_gaps(process: str, burstiness: float, seed: int) -> Iterator[float]:
    """Independent gaps of mean 1. process: "poisson", "constant", or "gamma" of shape `burstiness` (1 is Poisson).

    Not rescaled: the achieved rate of a Poisson process varies, and a run that pretends otherwise understates how much
    two runs differ.
    """
    if process == "constant":
        yield 0.0
        while True:
            yield 1.0
    shape = burstiness if process == "gamma" else 1.0
    source = random.Random(f"{seed} arrivals")
    while True:
        yield source.gammavariate(shape, 1.0 / shape)


def arrival_times(stages: tuple[Stage, ...], gaps: Iterable[float]) -> Iterator[float]:
    """Seconds of arrivals: unit gaps through the inverse of the cumulative rate. Ends with the last stage."""
    num_due, stage_start_s, stage_start_num = 0.0, 0.0, 0.0
    remaining = iter(stages)
    stage = next(remaining)
    for gap in gaps:
        num_due += gap
        while (time_s := _time_of(stage, num_due - stage_start_num)) > stage.seconds:
            stage_start_s += stage.seconds
            stage_start_num += (stage.first + stage.last) / 2 * stage.seconds
            following = next(remaining, None)
            if following is None:
                return
            stage = following
        yield stage_start_s + time_s


def _time_of(stage: Stage, count: float) -> float:
    """Seconds into the stage until `count` requests are due; inf if they never are."""
    slope = (stage.last - stage.first) / stage.seconds if math.isfinite(stage.seconds) else 0.0
    if slope == 0.0:
        return count / stage.first if stage.first > 0 else (0.0 if count <= 0 else math.inf)
    under = stage.first**2 + 2 * slope * count
    return (math.sqrt(under) - stage.first) / slope if under >= 0 else math.inf


def dated(plan: Iterable[PlannedRequest], times: Iterator[float]) -> Iterator[PlannedRequest]:
    """Gives each request that begins something its time; later turns follow their conversation."""
    for request in plan:
        if request.turn == 0:
            at_s = next(times, None)
            if at_s is None:
                return
            request.at_s = at_s
        yield request
