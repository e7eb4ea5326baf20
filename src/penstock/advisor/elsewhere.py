"""Whether another system would serve a workload better: from recorded measurements beside Penstock, and nothing else.

What was not measured beside it is named as unknown. The records are in measurements.json, each with source and date.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

import msgspec

from penstock.bench.metrics import Summary

# Runs of one program on the machine of the records differ by this much.
NOISE: Final = 0.05
MANY_PROMPTS: Final = 4.0  # uncached prompt tokens to one output token: prefill decides
MUCH_SHARED: Final = 0.3
NOT_MEASURED: Final = ("SGLang", "TensorRT-LLM")


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One pair of figures of one run. case: "batch", "prefill", or "shared prefix". batch: sequences at once.

    ours, theirs: in `unit`, more is better.
    """

    system: str
    format: str
    case: str
    batch: int
    unit: str
    ours: float
    theirs: float
    machine: str
    date: str
    source: str

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours


@dataclass(frozen=True)
class WorkloadShape:
    """Of one replica. running: requests in it, on average. prompts: uncached prompt tokens to an output token.

    shared: of the prompt tokens, found in the cache.
    """

    running: float
    prompts: float
    shared: float

    @classmethod
    def of(cls, summary: Summary, num_replicas: int) -> WorkloadShape:
        """By Little's law: as many as arrive in the time that one stays."""
        mean_s = summary.latency["e2e"].mean or 0.0
        running = summary.request_rate * mean_s / num_replicas if math.isfinite(mean_s) else math.inf
        cached = summary.cached_tokens or 0
        prompts = (summary.prompt_tokens - cached) / max(1, summary.output_tokens)
        return cls(running, prompts, cached / max(1, summary.prompt_tokens))

    def __str__(self) -> str:
        return (
            f"{self.running:.1f} requests at once in a replica, {self.prompts:.1f} uncached prompt tokens to an output "
            f"token, {self.shared:.0%} of the prompts shared"
        )


def recorded() -> list[Measurement]:
    """What is shipped."""
    data = files("penstock.advisor").joinpath("measurements.json").read_bytes()
    return msgspec.json.decode(data, type=list[Measurement])


def not_measured(shape: WorkloadShape) -> Iterator[str]:
    """Of a machine that is known by its limits only."""
    yield f"Beside other systems: the workload has {shape}."
    yield (
        "Nothing was measured on such a machine, neither Penstock nor another system: what is expected here is what "
        "its limits allow. vLLM, SGLang and TensorRT-LLM have published figures of their own for GPUs, Penstock has "
        "none yet: choose it there only when you have measured it beside them."
    )


def other_systems(shape: WorkloadShape, quantization: str, records: Sequence[Measurement]) -> Iterator[str]:
    """A line a system that was measured beside Penstock in a case like this one, and a line for the others."""
    yield f"Beside other systems: the workload has {shape}."
    wanted = quantization or "bf16"
    known = [record for record in records if record.format == wanted] or list(records)
    for system in sorted({record.system for record in known}):
        like = [record for record in known if record.system == system]
        for record in _alike(shape, like):
            yield _verdict(record, wanted)
    yield f"Not measured beside Penstock, so not judged: {', '.join(NOT_MEASURED)}, and whatever is not named above."


def _alike(shape: WorkloadShape, records: Sequence[Measurement]) -> Iterator[Measurement]:
    """The records of the cases that decide for such a workload."""
    cases = ["batch"]
    if shape.prompts > MANY_PROMPTS:
        cases.append("prefill")
    if shape.shared > MUCH_SHARED:
        cases.append("shared prefix")
    for case in cases:
        found = [record for record in records if record.case == case]
        if found:
            yield min(found, key=lambda record: abs(math.log(record.batch / max(1.0, min(shape.running, 1e6)))))


def _verdict(record: Measurement, wanted: str) -> str:
    if record.ratio > 1 + NOISE:
        word = f"would serve it better: {record.ratio:.2f} times Penstock's"
    elif record.ratio < 1 - NOISE:
        word = f"would serve it worse: {record.ratio:.2f} times Penstock's"
    else:
        word = f"serves it as well, within noise: {record.ratio:.2f} times Penstock's"
    case = {"batch": f"{record.batch} at once", "prefill": "prompts alone"}.get(record.case, record.case)
    other = "" if record.format == wanted else f"; of {wanted} there is no record"
    return (
        f"{record.system} {word} {record.unit} with {case} ({record.theirs:g} to {record.ours:g}, {record.format}, "
        f"{record.machine}, {record.date}, {record.source}{other})"
    )
