"""Sessions, searches and comparisons on simulated time, against a server whose capacity is known."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from penstock.bench.arrivals import arrival_times, dated, parse_rate, unit_gaps
from penstock.bench.capacity_search import SearchResult, search_capacity
from penstock.bench.datasets import Shape, conversations, random_prompts
from penstock.bench.measure import Comparison, RunOptions, Workload, paired_ratio, run_once, run_rounds
from penstock.bench.metrics import Summary, summarise
from penstock.bench.plan import PlannedRequest
from penstock.bench.prompts import PromptMaker
from penstock.bench.sample_size import mean_interval
from penstock.bench.server_metrics import read_samples
from penstock.bench.simulated_time import simulate
from penstock.bench.slo import parse_slo
from penstock.bench.target import Target

from .fake_server import Behaviour, FakeServer
from .pipes import connector_to
from .test_metrics import drive

MAKER = PromptMaker(as_chat=False)


def options_for(server: FakeServer) -> RunOptions:
    clock = asyncio.get_running_loop().time
    return RunOptions(sample_server=False, connector=connector_to(server.protocol), clock=clock)


@pytest.mark.parametrize("process", ["constant", "poisson"])
def test_the_search_finds_the_capacity(process: str) -> None:
    """4 requests at a time of 0.2 s each: 20 a second. A Poisson queue reaches any limit a little before."""
    slo = parse_slo(["ttft:p90=2s"])

    async def search() -> SearchResult:
        server = FakeServer(lambda _body, _number: Behaviour(first_s=0.1, gap_s=0.1), capacity=4, keeps_bodies=False)
        target = Target.of("http://fake:1", "fake")

        async def trial(rate: float) -> Summary:
            def plan(seed: int) -> Any:
                requests = random_prompts(Shape(1, 2), MAKER, round(rate * 60), seed)
                return dated(requests, arrival_times(parse_rate(f"{rate}"), unit_gaps(process, 1.0, seed)))

            record = await run_once(target, Workload(plan), 1, options_for(server))
            return summarise(record, slo)

        return await search_capacity(trial, 1.0)

    found = simulate(search)
    assert found.kept == pytest.approx(20, rel=0.05)
    assert found.kept < found.broken <= found.kept * 1.03


def test_the_search_says_when_nothing_keeps_the_slo() -> None:
    server = FakeServer(lambda _body, _number: Behaviour(status=500))
    refused = summarise(drive(server, [PlannedRequest([1], 1, 1, at_s=0.0)]), parse_slo(["ttft=1s"]))

    async def search() -> SearchResult:
        async def trial(_rate: float) -> Summary:
            return refused

        return await search_capacity(trial, 1.0)

    found = simulate(search)
    assert (found.kept, found.stopped) == (0.0, "no rate keeps this SLO")


def test_a_turn_follows_the_answer_before_it() -> None:
    """An open loop that sends turn 2 before turn 1 has ended plays a conversation that nobody had."""
    server = FakeServer(lambda _body, _number: Behaviour(first_s=1.0, gap_s=0.5))
    plan = list(conversations(Shape(3, 3, turns=3, think_s=0.0), PromptMaker(as_chat=True), 3, 1))
    for request in plan:
        request.at_s = 0.0 if request.turn == 0 else None
        request.think_s = 2.0
    record = drive(server, plan)
    start_s = server.arrivals_s[0]
    # Each answer takes 1 + 2 x 0.5 s, each thought 2 s.
    assert [at_s - start_s for at_s in server.arrivals_s] == pytest.approx([0.0, 4.0, 8.0])
    assert [seen.chunk_s[0] - seen.intended_s for seen in record.observations] == pytest.approx([1.0] * 3)
    said = server.bodies[2]["messages"]
    assert [message["role"] for message in said] == ["user", "assistant", "user", "assistant", "user"]
    assert said[1]["content"] == "word word word "


def test_a_recorded_turn_waits_for_its_time_and_its_predecessor() -> None:
    server = FakeServer(lambda _body, _number: Behaviour(first_s=3.0, gap_s=0.0))
    plan = [
        PlannedRequest([1], 1, 1, 0, at_s=0.0, session="a"),
        PlannedRequest([1], 1, 1, 1, at_s=1.0, session="a", turn=1),
        PlannedRequest([1], 1, 1, 2, at_s=9.0, session="a", turn=2),
    ]
    drive(server, plan)
    start_s = server.arrivals_s[0]
    assert [at_s - start_s for at_s in server.arrivals_s] == pytest.approx([0.0, 3.0, 9.0])


def test_a_turn_is_due_before_its_recorded_time_where_answers_come_sooner() -> None:
    """Recorded on a server that took 10 s; here the answer takes 1 s, and the user still thinks for 2 s."""
    server = FakeServer(lambda _body, _number: Behaviour(first_s=1.0))
    plan = [
        PlannedRequest([1], 1, 1, 0, at_s=0.0, session="a"),
        PlannedRequest([2], 1, 1, 1, at_s=5.0),
        PlannedRequest([3], 1, 1, 2, at_s=12.0, session="a", turn=1, think_s=2.0),
    ]
    record = drive(server, plan)
    found = {seen.request.index: seen for seen in record.observations}
    assert found[2].intended_s == pytest.approx(found[0].ended_s + 2.0)
    assert found[2].started_s == pytest.approx(found[2].intended_s, abs=1e-3)
    assert found[1].intended_s - record.start_s == pytest.approx(5.0)


def test_what_cannot_be_said_is_not_sent() -> None:
    server = FakeServer(lambda _body, number: Behaviour(status=500) if number == 1 else Behaviour())
    plan = list(conversations(Shape(3, 3, turns=4, think_s=0.0), PromptMaker(as_chat=True), 4, 1))
    for concurrency in (None, 1):
        server.num_seen = 0
        record = drive(server, plan, concurrency)
        assert (len(record.observations), record.num_skipped) == (2, 2)


def test_rounds_turn_their_order_and_share_their_requests() -> None:
    order: list[tuple[str, list[Any]]] = []

    async def compare() -> Comparison:
        def server(name: str, first_s: float) -> FakeServer:
            def behave(body: dict[str, Any], _number: int) -> Behaviour:
                order.append((name, body["prompt"]))
                return Behaviour(first_s=first_s)

            return FakeServer(behave)

        servers = {"one": server("one", 0.1), "two": server("two", 0.2)}
        targets = [Target.of(f"http://{name}:1", "fake") for name in servers]
        workload = Workload(lambda seed: random_prompts(Shape(4, 2), MAKER, 2, seed), concurrency=1)

        async def connect(protocol: Any) -> object:
            name = "one" if len(order) % 8 in (0, 1, 6, 7) else "two"
            return await connector_to(servers[name].protocol)(protocol)

        clock = asyncio.get_running_loop().time
        return await run_rounds(
            targets, workload, 7, 2, RunOptions(sample_server=False, connector=connect, clock=clock)
        )

    found = simulate(compare)
    assert [name for name, _ in order] == ["one", "one", "two", "two", "two", "two", "one", "one"]
    assert [prompt for _, prompt in order[:2]] == [prompt for _, prompt in order[2:4]]
    assert [prompt for _, prompt in order[4:6]] == [prompt for _, prompt in order[6:8]]
    assert order[0][1] != order[4][1]
    ttft = [[summarise(record).latency["ttft"].at(0.5).value for record in row] for row in found.records]
    assert ttft == [pytest.approx([0.1, 0.2])] * 2


def test_ratios_are_paired_by_rounds() -> None:
    """A machine that slows down from round to round changes no ratio."""
    found = paired_ratio([2.0, 4.1, 7.9], [1.0, 2.0, 4.0])
    assert found.ratio == pytest.approx(2.0083, abs=1e-3)
    assert found.differs
    assert not paired_ratio([1.0, 2.2, 2.8], [1.0, 2.0, 3.0]).differs
    assert not paired_ratio([2.0], [1.0]).differs  # one round shows nothing
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert mean - low == pytest.approx(high - mean)


def test_the_servers_own_metrics() -> None:
    text = (
        '# HELP x\npenstock_requests_running 3\nvllm:num_requests_waiting{model="a"} 4\n'
        'vllm:num_requests_waiting{model="b"} 1\npenstock_kv_cache_usage_ratio 0.25\nother 9\n'
    )
    assert read_samples(text) == {"running": 3.0, "waiting": 5.0, "kv_usage": 0.25}


def test_the_answer_that_was_given_is_put_into_the_next_prompt() -> None:
    """Then a replayed conversation hits the cache as far as the recorded one did."""

    server = FakeServer(lambda _body, _number: Behaviour(token_ids=(98, 99)))
    plan = [
        PlannedRequest([5, 6], 2, 2, 0, at_s=0.0, session="a"),
        PlannedRequest([5, 6, 1, 1, 7], 5, 2, 1, at_s=1.0, session="a", turn=1, answer_span=(2, 4)),
    ]
    drive(server, plan)
    assert server.bodies[1]["prompt"] == [5, 6, 98, 99, 7]
