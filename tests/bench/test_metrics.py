"""Every figure equals its analytic value; and each way in which known tools mislead has a test that they would fail."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from penstock.bench.load_client import LoadClient
from penstock.bench.load_run import LagMeter, LoadRun, RunRecord
from penstock.bench.metrics import Summary, summarise
from penstock.bench.observation import Observation
from penstock.bench.plan import PlannedRequest
from penstock.bench.sample_size import distribution, is_shown, late_probability, required_count
from penstock.bench.simulated_time import simulate
from penstock.bench.slo import parse_slo
from penstock.bench.target import Target

from .fake_server import Behaviour, FakeServer
from .pipes import connector_to

NEAR = {"rel": 0.01, "abs": 0.001}


def requests(count: int, gap_s: float | None = 0.5, tokens: int = 5, **more: Any) -> list[PlannedRequest]:
    return [
        PlannedRequest([1] * 8, 8, tokens, index, at_s=None if gap_s is None else index * gap_s, **more)
        for index in range(count)
    ]


def drive(
    server: FakeServer,
    plan: Iterable[PlannedRequest],
    concurrency: int | None = None,
    accept_s: Callable[[], float] = lambda: 0.0,
    **options: Any,
) -> RunRecord:
    """A run on simulated time."""

    async def run() -> RunRecord:
        seen: list[Observation] = []
        target = Target.of("http://fake:1", "fake")
        clock = asyncio.get_running_loop().time
        connector = connector_to(server.protocol, accept_s)
        client = LoadClient(target, seen.append, connector=connector, clock=clock, **options)
        lag = LagMeter(clock)
        load = LoadRun(client, plan)
        await (load.open_loop() if concurrency is None else load.closed_loop(concurrency))
        lag.stop()
        client.close()
        end_s = max((observation.ended_s for observation in seen), default=load.start_s)
        return RunRecord(seen, load.start_s, end_s, lag.lags_s, num_skipped=load.num_skipped)

    return simulate(run)


def of(behaviour: Behaviour, plan: Iterable[PlannedRequest] | None = None, **options: Any) -> Summary:
    return summarise(drive(FakeServer(lambda _body, _number: behaviour), plan or requests(20), **options))


def median(summary: Summary, metric: str) -> float:
    return summary.latency[metric].at(0.5).value


def test_every_metric_has_its_analytic_value() -> None:
    summary = of(Behaviour(first_s=0.1, gap_s=0.02, end_s=0.005, cached_tokens=3))
    assert summary.num_succeeded == 20
    assert summary.void == []
    assert summary.warnings == []
    for metric, expected in {"ttft": 0.1, "tpot": 0.02, "itl": 0.02, "itl_token": 0.02, "e2e": 0.185}.items():
        found = summary.latency[metric]
        assert found.mean == pytest.approx(expected, **NEAR)
        assert all(quantile.value == pytest.approx(expected, **NEAR) for quantile in found.quantiles)
    assert summary.latency["itl"].count == 20 * 4
    duration_s = 19 * 0.5 + 0.185
    assert summary.duration_s == pytest.approx(duration_s)
    assert summary.offered_rate == pytest.approx(2.0)
    assert summary.request_rate == pytest.approx(20 / duration_s)
    assert summary.output_token_rate == pytest.approx(100 / duration_s)
    # Sending lasted 9.5 s; of the answers, those of requests 2 to 18 lie inside its last nine tenths.
    assert summary.steady_output_token_rate == pytest.approx(17 * 5 / (0.9 * 9.5))
    assert (summary.prompt_tokens, summary.cached_tokens, summary.output_tokens) == (160, 60, 100)
    assert summary.max_in_flight == 1
    assert summary.send_lag.at(0.99).value == 0.0


def test_a_percentile_is_the_nearest_rank() -> None:
    behaviours = [Behaviour(first_s=0.01 * (number + 1)) for number in range(100)]
    record = drive(FakeServer(lambda _body, number: behaviours[number]), requests(100, tokens=1))
    ttft = summarise(record).latency["ttft"]
    assert [ttft.at(share).value for share in (0.5, 0.9, 0.99)] == pytest.approx([0.5, 0.9, 0.99])
    assert ttft.at(0.5).is_supported
    assert not ttft.at(0.99).is_supported  # of 100, only one lies above: the interval ends at the maximum


def test_speculated_chunks_per_chunk_per_token_per_request() -> None:
    """A server that sends four tokens every 80 ms makes 20 ms a token; 'ITL' alone could say either."""
    summary = of(Behaviour(first_s=0.1, gap_s=0.08, tokens_a_chunk=4, says_tokens=True), requests(4, 2.0, tokens=16))
    assert median(summary, "itl") == pytest.approx(0.08)
    assert median(summary, "itl_token") == pytest.approx(0.02)
    assert summary.latency["itl_token"].count == 4 * 12
    assert median(summary, "tpot") == pytest.approx(0.24 / 12)
    assert summary.tokens_per_chunk == pytest.approx(4.0)


def test_silent_chunks_share_the_tokens_that_usage_counts() -> None:
    summary = of(Behaviour(first_s=0.1, gap_s=0.08, tokens_a_chunk=4), requests(4, 2.0, tokens=16))
    assert median(summary, "itl_token") == pytest.approx(0.02)


def test_truncated_streams_are_failures() -> None:
    """vLLM's client counts any stream that brought one chunk as a success."""
    for how, why in (
        (Behaviour(cut_after=3), "cut off"),
        (Behaviour(leaves_out=("finish_reason",)), "no finish_reason"),
        (Behaviour(leaves_out=("[DONE]",)), "no [DONE]"),
        (Behaviour(error_event_after=2), "error event: internal_error"),
        (Behaviour(status=429), "status 429"),
    ):
        summary = of(how)
        assert (summary.num_succeeded, summary.failures) == (0, {why: 20})
        assert summary.latency["ttft"].at(0.5).value == math.inf


def test_failures_are_infinitely_late_in_percentiles() -> None:
    """A server that refuses its slow fifth must not look faster than one that serves it."""

    def behave(_body: Any, number: int) -> Behaviour:
        return Behaviour(status=503) if number % 5 == 0 else Behaviour()

    summary = summarise(drive(FakeServer(behave), requests(100)), parse_slo(["ttft:p90=1s"]))
    ttft = summary.latency["ttft"]
    assert ttft.at(0.5).value == pytest.approx(0.1)
    assert ttft.at(0.9).value == math.inf
    assert summary.goodput_share == pytest.approx(0.8)
    assert not summary.slo[0].is_kept


def test_the_time_starts_at_the_intended_send() -> None:
    """Coordinated omission: a stall of 10 s delays all who were to come meanwhile, and each one counts."""
    server = FakeServer(lambda _body, number: Behaviour(first_s=10.0 if number == 0 else 0.0, gap_s=0.0), capacity=1)
    ttft = summarise(drive(server, requests(100, 0.1, tokens=1))).latency["ttft"]
    assert ttft.at(0.5).value == pytest.approx(5.1, abs=0.11)
    assert ttft.at(0.999).value == pytest.approx(10.0, abs=0.01)
    # The closed loop that omits it: one slow request of a hundred.
    server = FakeServer(server.behave, capacity=1)
    closed = summarise(drive(server, requests(100, None, tokens=1), concurrency=1)).latency["ttft"]
    assert closed.at(0.9).value < 0.01


def test_slow_accepts_are_the_servers_time() -> None:
    """A client that starts its clock when the connection is there never sees a full backlog."""
    summary = of(Behaviour(), requests(20), accept_s=lambda: 0.7)
    assert median(summary, "ttft") == pytest.approx(0.1)  # of 20, most find a connection that is open
    assert summary.latency["ttft"].at(0.999).value == pytest.approx(0.8)
    assert summary.send_lag.at(0.999).value == 0.0
    assert summary.void == []


def test_an_empty_first_chunk_is_no_first_token() -> None:
    """vLLM's client takes the first completion chunk with `choices`, text or not."""
    assert median(of(Behaviour(first_s=0.5, empty_first_s=0.45)), "ttft") == pytest.approx(0.5)


def test_bytes_may_come_torn_anywhere() -> None:
    whole, torn = of(Behaviour()), of(Behaviour(pieces=7))
    assert torn.latency == whole.latency


def test_the_drain_is_not_the_steady_state() -> None:
    """Full throughput divides by the tail of the last answers as well; the steady one does not."""
    summary = of(Behaviour(first_s=1.0, gap_s=1.0), requests(100, 0.1, tokens=50))
    assert summary.output_token_rate == pytest.approx(5000 / (9.9 + 50), rel=0.01)
    assert summary.steady_output_token_rate == pytest.approx(50, rel=0.05)


def test_lengths_other_than_asked_for_are_flagged() -> None:
    """Servers that stop where they like are not doing the same work."""

    def behave(body: dict[str, Any], _number: int) -> Behaviour:
        body["max_tokens"] -= 1
        return Behaviour()

    summary = summarise(drive(FakeServer(behave), requests(20)))
    assert summary.warnings == ["20 of 20 answers had another length than asked for: compare servers with care"]


def test_prompts_that_the_server_counts_otherwise_are_flagged() -> None:
    assert any("1.50 times" in warning for warning in of(Behaviour(usage_factor=1.5)).warnings)


def test_a_late_client_voids_the_run() -> None:
    record = drive(FakeServer(), requests(100, 0.1))
    for seen in record.observations[:3]:
        seen.started_s += 0.05
    assert "send lag was 50.0 ms" in summarise(record).void[0]
    # A constant lag is as bad: it is measured against the plan, not against its own minimum (AIPerf).
    for seen in record.observations:
        seen.started_s = seen.intended_s + 0.05
    assert summarise(record).void
    # Of a limit of 2 s, it is a fortieth.
    assert not summarise(record, parse_slo(["ttft:p99=2s"])).void


def test_a_busy_event_loop_voids_the_run() -> None:
    record = drive(FakeServer(), requests(100, 0.1))
    for index in range(0, len(record.loop_lags_s), 50):
        record.loop_lags_s[index] = 0.2
    assert "event loop lag" in summarise(record).void[0]


def test_timeouts_and_cancels() -> None:
    summary = of(Behaviour(first_s=5.0), requests(10, 1.0), timeout_s=2.0)
    assert summary.failures == {"timeout": 10}
    cancelled = of(Behaviour(), requests(10, 1.0, tokens=50, cancel_after_s=0.3))
    assert (cancelled.num_cancelled, cancelled.num_failed, cancelled.latency["ttft"].count) == (10, 0, 0)


def test_goodput_counts_against_all_attempted() -> None:
    behaviours = [Behaviour(first_s=0.1), Behaviour(first_s=0.9), Behaviour(cut_after=2), Behaviour(gap_s=0.3)]
    record = drive(FakeServer(lambda _body, number: behaviours[number % 4]), requests(40, 3.0))
    summary = summarise(record, parse_slo(["ttft:p50=500ms", "tpot:p50=100ms"]))
    assert summary.goodput_share == pytest.approx(0.25)
    assert summary.goodput_rate == pytest.approx(10 / summary.duration_s)


def test_a_single_token_has_no_pace_and_passes_its_limit() -> None:
    record = drive(FakeServer(), requests(20, tokens=1))
    summary = summarise(record, parse_slo(["tpot=10ms", "itl=10ms"]))
    assert summary.latency["tpot"].count == 0
    assert [verdict.is_kept for verdict in summary.slo] == [True, True]
    assert summary.goodput_share == 1.0


def test_no_visible_output_is_read_at_its_end() -> None:
    summary = of(Behaviour(first_s=0.1, gap_s=0.0, end_s=0.4, empty_first_s=0.05), requests(4, tokens=0))
    assert summary.num_succeeded == 4


def test_the_sample_size_rule_is_mlperfs() -> None:
    """How many requests show p99 at 99 % confidence, by the number of late ones: MLPerf's early stopping, d = 0."""
    for num_late, count in {0: 459, 1: 662, 2: 838, 5: 1307, 10: 2010}.items():
        assert is_shown(num_late, count, 0.99)
        assert not is_shown(num_late, count - 1, 0.99)
    exact = sum(math.comb(50, k) * 0.1**k * 0.9 ** (50 - k) for k in range(4))
    assert late_probability(3, 50, 0.9) == pytest.approx(exact)


def test_intervals_of_percentiles() -> None:
    found = distribution([float(value) for value in range(1, 1001)]).at(0.99)
    assert (found.low, found.value, found.high) == (983.0, 990.0, 997.0)
    assert distribution([1.0] * required_count(0.99)).at(0.99).is_supported
    assert not distribution([1.0] * (required_count(0.99) - 1)).at(0.99).is_supported


def test_a_connection_closed_while_idle_is_no_failure() -> None:
    summary = of(Behaviour(closes=True))
    assert summary.num_succeeded == 20


def test_what_the_plan_raises_ends_the_run() -> None:
    def plan() -> Iterable[PlannedRequest]:
        yield from requests(3)
        raise ValueError("line 4 is malformed")

    with pytest.raises(ValueError, match="line 4"):
        drive(FakeServer(), plan())


def test_prompts_are_made_before_they_are_due() -> None:
    """A burst whose prompts are made when it is due goes out as slowly as they are made, and the server is blamed."""
    made_s: list[float] = []

    def plan() -> Iterable[PlannedRequest]:
        for request in requests(300, gap_s=1.0):
            request.at_s = float(request.index) if request.index < 280 else 280.0
            made_s.append(asyncio.get_running_loop().time())
            yield request

    record = drive(FakeServer(), plan())
    assert made_s[255] <= record.start_s
    assert made_s[299] < record.start_s + 280
    assert summarise(record).num_succeeded == 300


def test_an_error_far_ahead_is_told_in_its_place() -> None:
    def plan() -> Iterable[PlannedRequest]:
        yield from requests(300, gap_s=0.01)
        raise ValueError("line 301 is malformed")

    server = FakeServer()
    with pytest.raises(ValueError, match="line 301"):
        drive(server, plan())
    assert server.num_seen == 300


def test_the_simulated_loop_notices_a_deadlock() -> None:
    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="deadlock"):
        simulate(forever)
