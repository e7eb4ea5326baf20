"""Service level objectives: limits on latencies at a percentile, and MLPerf's classes as presets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from penstock.base.errors import ConfigError

METRICS: Final = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True, slots=True)
class Limit:
    """`share` of the values of `metric` are to be at most `limit_s` seconds."""

    metric: str
    share: float
    limit_s: float

    def __str__(self) -> str:
        return f"{self.metric} p{self.share * 100:g} <= {self.limit_s * 1e3:g} ms"


Slo = tuple[Limit, ...]


def _class(ttft_ms: float, tpot_ms: float) -> Slo:
    return Limit("ttft", 0.99, ttft_ms / 1e3), Limit("tpot", 0.99, tpot_ms / 1e3)


# MLCommons inference_rules.adoc, the server scenario's latency constraints: p99 of TTFT and TPOT in milliseconds.
PRESETS: Final[dict[str, Slo]] = {
    "mlperf-llama2-70b": _class(2000, 200),
    "mlperf-llama2-70b-interactive": _class(450, 40),
    "mlperf-llama3.1-8b": _class(2000, 100),
    "mlperf-llama3.1-8b-interactive": _class(500, 30),
    "mlperf-llama3.1-405b": _class(6000, 175),
    "mlperf-llama3.1-405b-interactive": _class(4500, 80),
    "mlperf-deepseek-r1": _class(2000, 80),
    "mlperf-deepseek-r1-interactive": _class(1500, 15),
    "mlperf-gpt-oss-120b": _class(3000, 80),
    "mlperf-gpt-oss-120b-interactive": _class(2000, 20),
}
_LIMIT = re.compile(r"(ttft|tpot|itl|e2e)(?::p(\d+(?:\.\d+)?))?[=:](\d+(?:\.\d+)?)(ms|s)?")


def parse_slo(texts: list[str]) -> Slo:
    """Of texts like "ttft:p99=500ms", "itl=50" (p99, milliseconds) or a preset's name. Raises ConfigError."""
    limits: list[Limit] = []
    for text in (part.strip() for given in texts for part in given.split(",")):
        if text in PRESETS:
            limits += PRESETS[text]
            continue
        match = _LIMIT.fullmatch(text)
        if match is None or not 0 < float(match[2] or 99) < 100:
            raise ConfigError(
                f"{text!r} is no service level objective.",
                remedy=f"Write ttft:p99=500ms (metrics: {', '.join(METRICS)}), or one of {', '.join(PRESETS)}.",
                param="slo",
            )
        limits.append(Limit(match[1], float(match[2] or 99) / 100, float(match[3]) / (1.0 if match[4] == "s" else 1e3)))
    return tuple(limits)
