"""The metrics of one server, in Prometheus' text format. Names are API: docs/api.md lists them, a test pins them.

Histograms are plain lists: observing one costs a bisection, so it can be done for every step of every request.
Owns: the counts.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from penstock.messages import EngineStats

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# Fine below 10 ms, where a small model's steps are, and up to minutes, where a full queue's waits are.
_LATENCY_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
    300.0, 600.0,
)  # fmt: skip
_TOKEN_LATENCY_S: Final = (
    0.0005, 0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75,
    1.0, 2.5, 10.0,
)  # fmt: skip
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 1_000_000)


class Histogram:
    """Cumulative distribution of observed values over fixed upper edges."""

    __slots__ = ("_counts", "_edges", "_sum", "help", "name")

    def __init__(self, name: str, text: str, edges: Sequence[float]) -> None:
        self.name = name
        self.help = text
        self._edges = list(edges)
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Adds `value`, `count` times (a step that gave several tokens spread over its gap)."""
        self._counts[bisect_left(self._edges, value)] += count
        self._sum += value * count

    def family(self) -> Metric:
        buckets: list[tuple[str, float]] = []
        total = 0
        for edge, count in zip([*self._edges, float("inf")], self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if edge == float("inf") else f"{edge:g}", total))
        return HistogramMetricFamily(self.name, self.help, buckets=buckets, sum_value=self._sum)


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """Facts that do not change while a server runs."""

    version: str
    model: str
    dtype: str = ""
    instruction_set: str = ""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What is read at the moment of a scrape. num_open: requests that the server works on now."""

    stats: EngineStats
    info: ServerInfo
    is_ready: bool
    num_open: int
    num_log_lines_dropped: int = 0


class ServerMetrics:
    """Counters and histograms that the server fills; gauges come from the Snapshot given to `render`."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(
            "penstock_time_to_first_token_seconds", "From a request's arrival to its first token, queue included.",
            _LATENCY_S,
        )  # fmt: skip
        self.inter_token_latency = Histogram(
            "penstock_inter_token_latency_seconds",
            "Gap between consecutive outputs of a sequence divided by its tokens, counted once a token.",
            _TOKEN_LATENCY_S,
        )
        self.request_duration = Histogram(
            "penstock_request_duration_seconds", "From arrival to the end of the answer.", _LATENCY_S
        )
        self.request_queue = Histogram(
            "penstock_request_queue_seconds", "From arrival until first scheduled.", _LATENCY_S
        )
        self.request_prompt_tokens = Histogram("penstock_request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.request_output_tokens = Histogram("penstock_request_output_tokens", "Output tokens of a request.", _TOKENS)
        self._requests: dict[tuple[str, str], int] = {}
        self._errors: dict[str, int] = {}
        self._process = ProcessCollector(registry=None)

    def count_request(self, endpoint: str, outcome: str) -> None:
        """endpoint and outcome come from closed sets: they are labels."""
        key = (endpoint, outcome)
        self._requests[key] = self._requests.get(key, 0) + 1

    def count_error(self, code: str) -> None:
        self._errors[code] = self._errors.get(code, 0) + 1

    def render(self, snapshot: Snapshot) -> bytes:
        registry = CollectorRegistry()
        registry.register(_Families([*all_families(self, snapshot), *self._process.collect()]))
        return generate_latest(registry)

    def families(self) -> Iterable[Metric]:
        """What was counted here."""
        requests = CounterMetricFamily(
            "penstock_requests", "Requests that ended, by how.", labels=["endpoint", "outcome"]
        )
        for (endpoint, outcome), count in self._requests.items():
            requests.add_metric([endpoint, outcome], count)
        yield requests
        errors = CounterMetricFamily("penstock_request_errors", "Requests that ended with an error.", labels=["code"])
        for code, count in self._errors.items():
            errors.add_metric([code], count)
        yield errors
        for histogram in (
            self.time_to_first_token, self.inter_token_latency, self.request_duration, self.request_queue,
            self.request_prompt_tokens, self.request_output_tokens,
        ):  # fmt: skip
            yield histogram.family()


def all_families(metrics: ServerMetrics, snapshot: Snapshot) -> list[Metric]:
    """Every metric family but the process's own."""
    return [*metrics.families(), *_snapshot_families(snapshot)]


class _Families(Collector):
    """Hands finished families to prometheus_client."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _snapshot_families(snapshot: Snapshot) -> Iterable[Metric]:
    stats, info, captures = snapshot.stats, snapshot.info, snapshot.stats.captures
    usage = kv_cache_usage(stats)
    for name, text, value in (
        ("penstock_requests_running", "Sequences in the running batch.", stats.num_running),
        ("penstock_requests_waiting", "Sequences in the queue.", stats.num_waiting),
        ("penstock_requests_open", "Requests that the server works on.", snapshot.num_open),
        ("penstock_kv_cache_usage_ratio", "Share of KV blocks that running sequences hold.", usage),
        ("penstock_kv_cache_blocks", "Blocks of the KV pool.", stats.num_blocks),
        ("penstock_kv_cache_free_blocks", "Blocks that hold nothing.", stats.num_free_blocks),
        ("penstock_kv_cache_cached_blocks", "Blocks that only the prefix cache holds.", stats.num_cached_blocks),
        ("penstock_kv_host_blocks", "Slots of the KV cache's host tier.", stats.num_host_blocks),
        ("penstock_kv_host_cached_blocks", "Slots of the host tier in use.", stats.num_host_cached_blocks),
        ("penstock_engine_last_step_seconds", "Duration of the last finished step.", stats.last_step_s),
        (
            "penstock_engine_drain_tokens_per_second",
            "Measured rate at which the queue empties.",
            stats.drain_tokens_per_s,
        ),
        ("penstock_graphs", "Shapes of steps that are captured and replayed.", captures.num_captured),
        ("penstock_graphs_waiting", "Shapes that are worth a capture.", captures.num_waiting),
        ("penstock_graph_memory_bytes", "Memory of the captures.", captures.nbytes),
        ("penstock_ready", "1 while the server takes requests.", int(snapshot.is_ready)),
    ):
        yield GaugeMetricFamily(name, text, value=value)
    for name, text, value in (
        ("penstock_prompt_tokens", "Prompt tokens of admitted sequences.", stats.num_prompt_tokens),
        ("penstock_prefix_hit_tokens", "Prompt tokens found in the prefix cache.", stats.num_cached_prompt_tokens),
        ("penstock_prefix_host_hit_tokens", "Those of them that came from the host tier.", stats.num_host_hit_tokens),
        ("penstock_kv_offloaded_blocks", "Blocks copied to the host tier.", stats.num_offloaded_blocks),
        ("penstock_kv_restored_blocks", "Blocks copied back from the host tier.", stats.num_restored_blocks),
        ("penstock_output_tokens", "Tokens generated.", stats.num_output_tokens),
        ("penstock_preemptions", "Times a sequence was set back to the queue.", stats.num_preemptions),
        ("penstock_requests_rejected", "Sequences that found the queue full.", stats.num_rejected),
        ("penstock_engine_steps", "Steps finished.", stats.num_steps),
        ("penstock_invariant_checks", "Times an idle engine checked its invariants.", stats.num_invariant_checks),
        ("penstock_invariant_violations", "Checks that failed. Always 0.", stats.num_invariant_violations),
        ("penstock_graph_capture_seconds", "Time that captures took, after the start.", captures.seconds),
        ("penstock_graph_failures", "Shapes that could not be captured.", captures.num_failed),
        ("penstock_steps_replayed", "Steps that ran as a captured graph.", captures.num_replayed),
        ("penstock_log_lines_dropped", "Log lines lost to a full queue.", snapshot.num_log_lines_dropped),
    ):
        yield CounterMetricFamily(name, text, value=value)
    facts = dataclasses.asdict(info)
    yield InfoMetricFamily("penstock_build", "What runs here.", value=facts)
    # The names that the inference gateway's endpoint picker and KEDA examples read.
    for name, text, value in (
        ("vllm:num_requests_running", "Alias of penstock_requests_running.", stats.num_running),
        ("vllm:num_requests_waiting", "Alias of penstock_requests_waiting.", stats.num_waiting),
        ("vllm:kv_cache_usage_perc", "Alias of penstock_kv_cache_usage_ratio (0 to 1).", usage),
    ):
        family = GaugeMetricFamily(name, text, labels=["model_name", "engine"])
        family.add_metric([info.model, "0"], value)
        yield family


def kv_cache_usage(stats: EngineStats) -> float:
    """Share of the pool that running sequences hold: neither free nor merely cached. 0 to 1."""
    if not stats.num_blocks:
        return 0.0
    return max(0.0, 1.0 - (stats.num_free_blocks + stats.num_cached_blocks) / stats.num_blocks)
