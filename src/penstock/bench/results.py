"""A run as JSON: our figures with their definitions, and flat keys in the form of vLLM's bench."""

from __future__ import annotations

import dataclasses
import itertools
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from penstock.base.errors import ConfigError
from penstock.bench.load_run import RunRecord
from penstock.bench.metrics import DEFINITIONS, Summary, conclude, tokens_of
from penstock.bench.observation import Observation
from penstock.bench.plan import PlannedRequest
from penstock.bench.sample_size import Distribution


def summary_json(summary: Summary) -> dict[str, Any]:
    """Plain values; inf becomes None beside the count of what was infinite."""
    fields = {field.name: getattr(summary, field.name) for field in dataclasses.fields(summary)}
    fields["latency"] = {name: _distribution(values) for name, values in summary.latency.items()}
    fields["send_lag"], fields["loop_lag"] = _distribution(summary.send_lag), _distribution(summary.loop_lag)
    fields["slo"] = [
        {"limit": str(verdict.limit), "value_ms": _ms(verdict.value_s), "kept": verdict.is_kept,
         "shown_at_99_percent": verdict.is_shown}
        for verdict in summary.slo
    ]  # fmt: skip
    return {name: _finite(value) for name, value in fields.items()}


def _distribution(values: Distribution) -> dict[str, Any]:
    found: dict[str, Any] = {
        "count": values.count,
        "infinite": values.num_infinite,
        "mean_ms": _ms(values.mean),
        "std_ms": _ms(values.deviation),
    }
    for quantile in values.quantiles:
        found[f"p{quantile.share * 100:g}"] = {
            "ms": _ms(quantile.value), "low_ms": _ms(quantile.low), "high_ms": _ms(quantile.high),
            "supported": quantile.is_supported,
        }  # fmt: skip
    return found


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else seconds * 1e3


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def vllm_keys(record: RunRecord, summary: Summary) -> dict[str, Any]:
    """vLLM's bench's names with vLLM's meanings: good requests only, times from the actual send, gaps of chunks.

    Its completions client takes the first event with a choice for the first token, and ends a request at its last
    event; tpot is (end - first) / (tokens - 1).
    """
    good = [seen for seen in record.observations if seen.is_success]
    ttft = [seen.first_event_s - seen.sent_s for seen in good]
    e2el = [seen.last_event_s - seen.sent_s for seen in good]
    tpot = [
        (end - first) / (count - 1)
        for end, first, count in zip(e2el, ttft, map(tokens_of, good), strict=True)
        if count > 1
    ]
    itl = [after - before for seen in good for before, after in itertools.pairwise(seen.chunk_s)]
    keys: dict[str, Any] = {
        "duration": summary.duration_s,
        "completed": summary.num_succeeded,
        "failed": summary.num_failed,
        "total_input_tokens": summary.prompt_tokens,
        "total_output_tokens": summary.output_tokens,
        "request_throughput": summary.request_rate,
        "request_goodput": summary.goodput_rate,
        "output_throughput": summary.output_token_rate,
        "total_token_throughput": (summary.prompt_tokens + summary.output_tokens) / summary.duration_s,
        "max_concurrent_requests": summary.max_in_flight,
    }
    for name, values in {"ttft": ttft, "tpot": tpot, "itl": itl, "e2el": e2el}.items():
        data = np.asarray(values or [0.0]) * 1e3
        keys |= {f"mean_{name}_ms": float(data.mean()), f"median_{name}_ms": float(np.median(data)),
                 f"std_{name}_ms": float(data.std()), f"p99_{name}_ms": float(np.percentile(data, 99))}  # fmt: skip
    return keys


def run_json(record: RunRecord, summary: Summary, manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        **vllm_keys(record, summary),
        "summary": summary_json(summary),
        "definitions": DEFINITIONS,
        "manifest": manifest,
        "server_samples": record.server_samples,
    }


def request_rows(record: RunRecord) -> Iterator[dict[str, Any]]:
    """One object a request: what was observed, milliseconds after the start of the run."""

    def ms(moment_s: float) -> float | None:
        return None if math.isnan(moment_s) else round((moment_s - record.start_s) * 1e3, 3)

    for seen in record.observations:
        outcome = conclude(seen)
        yield {
            "index": seen.request.index, "session": seen.request.session, "tenant": seen.request.tenant,
            "intended_ms": ms(seen.intended_s), "started_ms": ms(seen.started_s), "sent_ms": ms(seen.sent_s),
            "ended_ms": ms(seen.ended_s), "status": seen.status, "failure": seen.failure, "refusal": seen.refusal,
            "cancelled": seen.is_cancelled, "finish_reason": seen.finish_reason,
            "prompt_tokens": seen.prompt_tokens, "cached_tokens": seen.cached_tokens,
            "output_tokens": outcome.num_tokens, "planned_output_tokens": seen.request.output_tokens,
            "chunk_ms": [ms(moment_s) for moment_s in seen.chunk_s], "chunk_tokens": list(seen.chunk_tokens),
            "last_event_ms": ms(seen.last_event_s),
        }  # fmt: skip


def write_requests(path: Path, record: RunRecord) -> None:
    """request_rows as JSON lines."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        file.writelines(encoder.encode(row) + b"\n" for row in request_rows(record))


def read_requests(path: Path) -> RunRecord:
    """What write_requests wrote, as a run whose clock starts at 0. Raises ConfigError."""
    observations: list[Observation] = []
    try:
        with path.open("rb") as lines:
            observations = [_observation(msgspec.json.decode(line)) for line in lines]
    except (OSError, msgspec.DecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no file of `penstock bench serve --requests-out`: {error}.") from None
    end_s = max((seen.ended_s for seen in observations), default=0.0)
    return RunRecord(observations, 0.0, end_s, array("d"))


def _observation(row: dict[str, Any]) -> Observation:
    def seconds(name: str) -> float:
        return math.nan if row[name] is None else row[name] / 1e3

    request = PlannedRequest(
        [], 0, row["planned_output_tokens"], row["index"], session=row["session"], tenant=row["tenant"]
    )
    return Observation(
        request, seconds("intended_ms"), seconds("started_ms"), seconds("sent_ms"), seconds("ended_ms"),
        row["status"], True, row["finish_reason"], not row["failure"], row["failure"],
        row.get("refusal", ""), row["cancelled"],
        row["output_tokens"], row["prompt_tokens"], row["cached_tokens"], last_event_s=seconds("last_event_ms"),
        chunk_s=array("d", [moment / 1e3 for moment in row["chunk_ms"]]), chunk_tokens=array("l", row["chunk_tokens"]),
    )  # fmt: skip
