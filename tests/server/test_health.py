"""Health in three meanings, the watchdog behind it, and the metrics page."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.config.settings import Settings
from penstock.server.health import SILENCE_S, Signs, Watchdog

from .fakes import RunningServer, start_server

BODY: dict[str, Any] = {"model": "demo", "prompt": "hello", "max_tokens": 5}


def signs(**change: Any) -> Signs:
    base = {"now_s": 100.0, "is_alive": True, "last_message_s": 100.0, "stalled_s": 0.0, "cpu_s": 1.0}
    return Signs(**{**base, **change})


def test_a_watchdog_that_saw_nothing_is_not_ok() -> None:
    assert not Watchdog(30).verdict.is_ok


def test_an_idle_engine_is_ok_while_it_reports() -> None:
    watchdog = Watchdog(30)
    for second in range(100):
        assert watchdog.observe(signs(now_s=second, last_message_s=second - 0.5)).is_ok


def test_a_stopped_engine_is_noticed_by_its_silence() -> None:
    watchdog = Watchdog(30)
    assert watchdog.observe(signs(now_s=100)).is_ok
    assert watchdog.observe(signs(now_s=100 + SILENCE_S)).is_ok
    verdict = watchdog.observe(signs(now_s=101 + SILENCE_S))
    assert not verdict.is_ok
    assert "has not run" in verdict.reason
    assert watchdog.observe(signs(now_s=120, last_message_s=119)).is_ok, "and forgiven"


def test_a_long_step_is_busy_not_stuck_until_the_stall_timeout() -> None:
    watchdog = Watchdog(30)
    for second in range(1, 31):
        assert watchdog.observe(signs(now_s=100 + second, stalled_s=second, cpu_s=1.0 + second)).is_ok, second
    verdict = watchdog.observe(signs(now_s=131, stalled_s=31, cpu_s=32.0))
    assert not verdict.is_ok
    assert "31 s" in verdict.reason


def test_an_ended_engine_is_not_ok() -> None:
    assert "ended" in Watchdog(30).observe(signs(is_alive=False)).reason


def test_without_processor_times_silence_alone_decides_nothing() -> None:
    watchdog = Watchdog(30)
    assert watchdog.observe(signs(now_s=120, cpu_s=None)).is_ok
    assert not watchdog.observe(signs(now_s=131, stalled_s=31, cpu_s=None)).is_ok


async def statuses(server: RunningServer) -> tuple[int, int, int]:
    async with server.client() as http:
        return tuple(  # type: ignore[return-value]
            [(await http.get(f"/health/{name}")).status_code for name in ("live", "ready", "progress")]
        )


async def test_loading_is_alive_and_not_ready() -> None:
    async with start_server(Settings(port=0), is_serving=False) as server:
        assert await statuses(server) == (200, 503, 503)
        async with server.client() as http:
            answer = await http.post("/v1/completions", json=BODY)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
            assert "retry-after" in answer.headers
            assert (await http.get("/metrics")).status_code == 200
            assert (await http.get("/v1/models")).status_code == 200
        server.state.serve(server.engine, server.text)
        assert await statuses(server) == (200, 200, 200)


async def test_a_dead_engine_is_not_ready(server: RunningServer) -> None:
    assert await statuses(server) == (200, 200, 200)
    server.engine.is_alive = False
    server.state.observe_engine()
    assert await statuses(server) == (200, 503, 503)
    assert server.state.engine_died.is_set()


async def test_a_stalled_engine_is_named(server: RunningServer) -> None:
    server.engine.hold.clear()
    async with server.client() as http:
        asking = asyncio.create_task(http.post("/v1/completions", json=BODY))
        await server.until(lambda: server.engine.num_open == 1)
        server.engine.last_message_s -= 1000
        server.engine.stats.num_steps = 41
        server.engine.stats.step_started_s = server.engine.last_message_s
        server.state.observe_engine()
        report = (await http.get("/health/progress")).json()
        assert (await http.get("/health/live")).status_code == 200
        assert report["step_in_flight"] == 42
        assert report["seconds_without_progress"] > 900
        assert "no step has finished" in report["status"]
        server.engine.hold.set()
        assert (await asking).status_code == 200
        server.state.observe_engine()
        assert (await http.get("/health/progress")).status_code == 200


# Metric names are API: a dashboard reads them. Removing one needs a deprecation.
METRICS = {
    "penstock_time_to_first_token_seconds", "penstock_inter_token_latency_seconds", "penstock_request_duration_seconds",
    "penstock_request_queue_seconds", "penstock_request_prompt_tokens", "penstock_request_output_tokens",
    "penstock_requests", "penstock_request_errors", "penstock_requests_running", "penstock_requests_waiting",
    "penstock_requests_open", "penstock_kv_cache_usage_ratio", "penstock_kv_cache_blocks",
    "penstock_kv_cache_free_blocks", "penstock_kv_cache_cached_blocks", "penstock_engine_last_step_seconds",
    "penstock_engine_drain_tokens_per_second", "penstock_ready", "penstock_prompt_tokens", "penstock_prefix_hit_tokens",
    "penstock_output_tokens", "penstock_preemptions", "penstock_requests_rejected", "penstock_engine_steps",
    "penstock_kv_host_blocks", "penstock_kv_host_cached_blocks", "penstock_kv_offloaded_blocks",
    "penstock_kv_restored_blocks", "penstock_prefix_host_hit_tokens", "penstock_graphs", "penstock_graphs_waiting",
    "penstock_graph_memory_bytes",
    "penstock_graph_capture_seconds", "penstock_graph_failures", "penstock_steps_replayed",
    "penstock_invariant_checks", "penstock_invariant_violations", "penstock_log_lines_dropped", "penstock_build_info",
    "vllm:num_requests_running", "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
}  # fmt: skip


async def scrape(server: RunningServer) -> dict[str, Any]:
    async with server.client() as http:
        answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


async def test_the_metrics_page_holds_every_name(server: RunningServer) -> None:
    families = await scrape(server)
    assert {name for name in families if not name.startswith("process_")} == METRICS
    assert "process_resident_memory_bytes" in families


async def test_metrics_count_what_happened(server: RunningServer) -> None:
    async with server.client() as http:
        for _ in range(3):
            await http.post("/v1/completions", json=BODY)
        await http.post("/v1/completions", json={**BODY, "n": 0})
    await server.settled()
    families = await scrape(server)

    def value(family: str, name: str, **labels: str) -> float:
        return float(
            next(sample.value for sample in families[family].samples if sample.name == name and sample.labels == labels)
        )

    assert value("penstock_requests", "penstock_requests_total", endpoint="completions", outcome="length") == 3
    assert value("penstock_requests", "penstock_requests_total", endpoint="completions", outcome="refused") == 1
    assert value("penstock_request_errors", "penstock_request_errors_total", code="invalid_request") == 1
    ttft = "penstock_time_to_first_token_seconds"
    assert value(ttft, f"{ttft}_count") == 3
    assert value("penstock_inter_token_latency_seconds", "penstock_inter_token_latency_seconds_count") == 12
    assert value("penstock_request_output_tokens", "penstock_request_output_tokens_sum") == 15
    assert value("penstock_kv_cache_usage_ratio", "penstock_kv_cache_usage_ratio") == pytest.approx(2 / 64)
    assert value(
        "vllm:kv_cache_usage_perc", "vllm:kv_cache_usage_perc", model_name="demo", engine="0"
    ) == pytest.approx(2 / 64)
    assert value("penstock_ready", "penstock_ready") == 1
