"""Histograms, phases, log lines and usage records."""

from __future__ import annotations

import io
import json
import logging
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.messages import EngineStats
from penstock.observability.logs import LogSink
from penstock.observability.metrics import Histogram, ServerInfo, ServerMetrics, Snapshot, kv_cache_usage
from penstock.observability.phases import PhaseTimer
from penstock.observability.usage import UsageLog, UsageRecord


def test_a_histogram_counts_cumulatively() -> None:
    histogram = Histogram("x_seconds", "text", [1.0, 2.0, 5.0])
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    histogram.observe(3.0, count=10)
    samples = {(sample.name, sample.labels.get("le")): sample.value for sample in histogram.family().samples}
    assert samples == {
        ("x_seconds_bucket", "1"): 2, ("x_seconds_bucket", "2"): 3, ("x_seconds_bucket", "5"): 13,
        ("x_seconds_bucket", "+Inf"): 14, ("x_seconds_count", None): 14, ("x_seconds_sum", None): 42.0,
    }  # fmt: skip


def test_two_servers_share_no_counts() -> None:
    first, second = ServerMetrics(), ServerMetrics()
    first.count_request("chat", "stop")
    snapshot = Snapshot(stats=EngineStats(), info=ServerInfo(version="1", model="m"), is_ready=True, num_open=0)
    pages = [metrics.render(snapshot).decode() for metrics in (first, second)]
    counts = [
        sum(sample.value for family in text_string_to_metric_families(page) if family.name == "penstock_requests"
            for sample in family.samples)
        for page in pages
    ]  # fmt: skip
    assert counts == [1, 0]


@pytest.mark.parametrize(
    ("stats", "usage"),
    [
        (EngineStats(), 0.0),
        (EngineStats(num_blocks=10, num_free_blocks=10), 0.0),
        (EngineStats(num_blocks=10, num_free_blocks=2, num_cached_blocks=3), 0.5),
        (EngineStats(num_blocks=10, num_free_blocks=0, num_cached_blocks=0), 1.0),
    ],
)
def test_kv_cache_usage(stats: EngineStats, usage: float) -> None:
    assert kv_cache_usage(stats) == pytest.approx(usage)


def test_phases_sum_to_the_wall_time() -> None:
    now = 10.0
    timer = PhaseTimer("first", origin_s=8.0, clock=lambda: now)
    now = 11.0
    timer.begin("second")
    now = 15.0
    timer.end([("inner a", 1.0), ("inner b", 2.5)])
    now = 15.5  # between phases: counted to the last one
    timer.begin("third")
    now = 17.0
    timer.end()
    assert timer.phases == [("first", 3.0), ("second", 0.5), ("inner a", 1.0), ("inner b", 3.0), ("third", 1.5)]
    assert timer.total_s == 9.0
    assert sum(seconds for _, seconds in timer.phases) == timer.total_s
    assert timer.table()[-1].split() == ["total", "9.00", "s"]


def make_record(**fields: object) -> UsageRecord:
    return UsageRecord(request_id="r1", endpoint="chat", model="m", outcome="stop", **fields)  # type: ignore[arg-type]


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def emit(stream: io.StringIO, log_format: str, record: UsageRecord) -> str:
    sink = LogSink(log_format, stream)
    logger = logging.getLogger("penstock.usage")
    logger.addHandler(sink)
    logger.setLevel(logging.INFO)
    try:
        UsageLog(ServerMetrics()).close(record)
    finally:
        logger.removeHandler(sink)
        sink.close()
    return stream.getvalue()


def test_a_usage_record_is_one_line_of_json(stream: io.StringIO) -> None:
    line = emit(stream, "json", make_record(num_output_tokens=5, duration_s=1.5, metadata={"a": "b"}))
    entry = json.loads(line)
    assert (entry["request_id"], entry["outcome"], entry["num_output_tokens"]) == ("r1", "stop", 5)
    assert entry["metadata"] == {"a": "b"}
    assert entry["level"] == "info"


def test_what_clients_write_cannot_forge_a_line(stream: io.StringIO) -> None:
    line = emit(stream, "text", make_record(user="eve\n2026 error forged", metadata={"k": "v\nw"}))
    assert line.count("\n") == 1
    assert 'user="eve\\n2026 error forged"' in line


def test_a_hung_stream_costs_lines_and_nothing_else() -> None:
    release = threading.Event()

    class Hung(io.StringIO):
        def write(self, text: str) -> int:
            release.wait(10)
            return super().write(text)

    stream = Hung()
    sink = LogSink("text", stream, capacity=5)
    for number in range(50):
        sink.handle(logging.LogRecord("x", logging.INFO, "f", 1, f"line {number}", None, None))
    assert sink.num_dropped >= 44
    release.set()
    sink.close()
    assert stream.getvalue().count("\n") == 50 - sink.num_dropped


def test_a_closed_stream_is_survived() -> None:
    stream = io.StringIO()
    stream.close()
    sink = LogSink("text", stream)
    sink.handle(logging.LogRecord("x", logging.INFO, "f", 1, "lost", None, None))
    sink.close()
    assert sink.num_dropped == 1


def test_exceptions_are_logged_with_their_trace(stream: io.StringIO) -> None:
    sink = LogSink("json", stream)
    try:
        raise RuntimeError("inside")
    except RuntimeError:
        import sys

        sink.handle(logging.LogRecord("x", logging.ERROR, "f", 1, "failed", None, sys.exc_info()))
    sink.close()
    assert "RuntimeError: inside" in json.loads(stream.getvalue())["exception"]
