"""Random traffic through the scheduler and a runner that checks every plan; every invariant after every step."""

from __future__ import annotations

import random
from collections import deque

import msgspec
import pytest
from fake_runner import VOCAB_SIZE, FakeRunner, digest_of, undisturbed_tokens
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.base.errors import QueueFullError
from penstock.config.engine import CacheConfig, SchedulerConfig
from penstock.kvcache import KVCacheManager
from penstock.messages import (
    EngineRequest,
    FinishReason,
    PoolingParams,
    RequestOutput,
    SamplingParams,
    SchedulerOutput,
    StepResult,
)
from penstock.messages.bounds import BACKGROUND_PRIORITY
from penstock.scheduler import Scheduler

BLOCK_SIZE = 4


class Driver:
    """The engine's loop with `depth` steps in flight beyond the one being planned, and a ledger of what came out."""

    def __init__(
        self, depth: int, num_blocks: int, caching: bool, config: SchedulerConfig, num_host_blocks: int = 0
    ) -> None:
        self.depth = depth
        self.now = 0.0
        self.kv = KVCacheManager(
            CacheConfig(
                block_size=BLOCK_SIZE, num_blocks=num_blocks, enable_prefix_caching=caching,
                num_host_blocks=num_host_blocks,
            )
        )  # fmt: skip
        self.scheduler = Scheduler(config, self.kv)
        self.runner = FakeRunner(BLOCK_SIZE, config.max_num_seqs, config.max_num_batched_tokens)
        self.in_flight: deque[tuple[SchedulerOutput, StepResult]] = deque()
        self.accepted: dict[str, EngineRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.final: dict[str, RequestOutput] = {}

    def add(self, request: EngineRequest) -> None:
        try:
            self.scheduler.add(request, self.now)
        except QueueFullError:
            return
        self.accepted[request.request_id] = request
        self.tokens[request.request_id] = []

    def collect(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.final, "something came after the final output"
            tokens = self.tokens[output.request_id]
            request = self.accepted[output.request_id]
            if output.prompt_logprobs is not None:
                assert not tokens, "prompt logprobs come with the first output"
                expected = [-float(position) for position in range(1, len(request.prompt_token_ids))]
                assert [entry.logprob for entry in output.prompt_logprobs] == expected
            elif request.sampling.prompt_logprobs is not None and output.token_ids:
                assert tokens, "prompt logprobs were not delivered"
            tokens += output.token_ids
            assert output.num_output_tokens == len(tokens)
            if output.finish_reason is not None:
                self.final[output.request_id] = output

    def step(self) -> bool:
        """One turn of the loop; whether anything was planned."""
        self.now += 0.01
        output = self.scheduler.schedule(self.now)
        if output is not None:
            self.in_flight.append((output, self.runner.execute(output)))
        while len(self.in_flight) > (self.depth if output is not None else 0):
            done, result = self.in_flight.popleft()
            self.collect(self.scheduler.update(done, result, self.now))
            self.runner.updated_step = done.step_id
        if output is None:
            assert not self.in_flight
        self.scheduler.check()
        return output is not None

    def drain(self) -> None:
        """Runs until everything has ended, and checks what every request got."""
        idle = 0
        for _ in range(5000):
            idle = 0 if self.step() else idle + 1
            if not self.scheduler.has_work():
                break
            self.collect(self.scheduler.take_finished())
            assert idle < 3, "nothing is planned although requests wait"
        assert not self.scheduler.has_work()
        assert set(self.final) == set(self.accepted), "each accepted request ends exactly once"
        assert self.kv.num_available == self.kv.num_blocks, "blocks leaked"
        assert self.kv.num_tables == 0
        for request_id, request in self.accepted.items():
            self.check_result(request, self.final[request_id])

    def check_result(self, request: EngineRequest, final: RequestOutput) -> None:
        tokens = self.tokens[request.request_id]
        expected = undisturbed_tokens(request.prompt_token_ids, request.max_tokens)
        assert tokens == expected[: len(tokens)]
        stop_at = next(
            (
                index
                for index, token in enumerate(expected)
                if token in request.stop_token_ids and index >= request.sampling.min_tokens
            ),
            None,
        )  # a STOP without a token is an abort: the frontend found a stop string
        if final.finish_reason is FinishReason.STOP and final.stop_token_id is not None:
            assert len(tokens) == stop_at
            assert final.stop_token_id == expected[len(tokens)]
        elif final.finish_reason is FinishReason.LENGTH:
            assert tokens == expected
            assert stop_at is None
        else:
            assert stop_at is None or len(tokens) <= stop_at
            assert (final.error is not None) == (final.finish_reason is FinishReason.ERROR)
        if final.pooled is not None:
            assert (final.finish_reason, tokens) == (FinishReason.STOP, [])
            assert final.pooled == digest_of(request.prompt_token_ids).to_bytes(4, "little")
        elif request.pooling is not None:  # ended before: an abort may say STOP too
            assert final.finish_reason is not FinishReason.LENGTH
        assert final.num_prompt_tokens == len(request.prompt_token_ids)
        assert final.num_cached_tokens < len(request.prompt_token_ids)
        assert final.timings is not None
        assert final.timings.num_preemptions <= 2
        assert final.timings.finished_s >= request.arrival_s


prompts = st.one_of(
    st.lists(st.integers(0, 2), min_size=1, max_size=24),
    # A long shared beginning, so that there is something worth waiting for.
    st.builds(lambda count, tail: [7] * count + tail, st.integers(60, 90), st.lists(st.integers(0, 2), max_size=6)),
)

shapes = st.builds(
    EngineRequest,
    request_id=st.just(""),
    prompt_token_ids=prompts,
    sampling=st.builds(SamplingParams, min_tokens=st.integers(0, 3), prompt_logprobs=st.sampled_from([None, None, 0])),
    max_tokens=st.integers(1, 40),
    namespace=st.sampled_from(["", "", "tenant"]),
    priority=st.sampled_from([-1, 0, 1, BACKGROUND_PRIORITY]),
    deadline_s=st.one_of(st.none(), st.floats(0.0, 0.3)),  # from now
    pooling=st.sampled_from([None, None, None, PoolingParams(kind="embed")]),
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        depth=st.integers(1, 2),
        pools=st.tuples(st.sampled_from([26, 30, 40, 80]), st.sampled_from([0, 3, 20, 100])),
        max_num_seqs=st.integers(1, 6),
        budget=st.sampled_from([1, 3, 8, 40, 200]),
        watermark=st.integers(0, 3),
        policy=st.sampled_from(["fcfs", "priority"]),
        target_step_s=st.sampled_from([0.0, 0.02]),
        modes=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    )
    def build(
        self, depth: int, pools: tuple[int, int], max_num_seqs: int, budget: int, watermark: int, policy: str,
        target_step_s: float, modes: tuple[bool, bool, bool],
    ) -> None:  # fmt: skip
        """pools: blocks on the device and on the host. modes: whether prefixes are cached; one-pass requests need every
        position; draws may give several tokens."""
        caching, pools_every_token, jumps = modes
        config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=104,
            max_num_queued_requests=12,
            max_num_queued_tokens=600,
            watermark_blocks=watermark,
            policy=policy,
            target_step_s=target_step_s,
            pools_every_token=pools_every_token,
        )
        self.driver = Driver(depth, pools[0], caching, config, pools[1])
        self.driver.runner.pools_every_token = pools_every_token
        self.driver.runner.jumps = jumps
        self.failing: set[str] = set()
        self.driver.runner.fails = self.failing.__contains__

    @rule(shape=shapes, stops=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3), copies=st.integers(1, 3))
    def add(self, shape: EngineRequest, stops: list[int], copies: int) -> None:
        driver = self.driver
        for _ in range(copies):
            request = msgspec.structs.replace(shape, request_id=f"r{len(driver.accepted)}", stop_token_ids=tuple(stops))
            request.max_tokens = min(shape.max_tokens, 104 - len(shape.prompt_token_ids))
            if shape.pooling is not None:
                request.max_tokens = 1
            request.arrival_s = driver.now
            if shape.deadline_s is not None:
                request.deadline_s = driver.now + shape.deadline_s
            driver.add(request)

    def pick(self, choice: int) -> str | None:
        live = [request_id for request_id in self.driver.accepted if request_id not in self.driver.final]
        return live[choice % len(live)] if live else None

    @rule(choice=st.integers(0, 50), reason=st.sampled_from([FinishReason.ABORT, FinishReason.STOP]))
    def abort(self, choice: int, reason: FinishReason) -> None:
        request_id = self.pick(choice)
        if request_id is None:
            return
        driver = self.driver
        before = driver.kv.num_available
        outputs = driver.scheduler.abort([request_id, "unknown", request_id], reason, driver.now)
        # Expired in schedule(): its final output is made, and comes with the next update.
        assert [output.finish_reason for output in outputs] in ([reason], [])
        assert driver.kv.num_available >= before
        driver.collect(outputs)

    @rule(choice=st.integers(0, 50))
    def fail_next_step(self, choice: int) -> None:
        request_id = self.pick(choice)
        if request_id is not None:
            self.failing.add(request_id)

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.driver.step()

    @invariant()
    @precondition(lambda self: hasattr(self, "driver"))
    def invariants_hold(self) -> None:
        self.driver.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.drain()


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestScheduler = SchedulerMachine.TestCase


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("caching", "num_host_blocks"), [(True, 0), (True, 40), (False, 0)])
def test_a_hostile_hour_in_miniature(depth: int, caching: bool, num_host_blocks: int) -> None:
    """3,000 requests in bursts over a pool that holds about four of them; aborts, deadlines, failures, preemptions."""
    rng = random.Random(depth)
    config = SchedulerConfig(
        max_num_seqs=16,
        max_num_batched_tokens=64,
        max_model_len=100,
        max_num_queued_requests=200,
        max_num_queued_tokens=20_000,
        watermark_blocks=0,
    )
    driver = Driver(depth, 60, caching, config, num_host_blocks)
    driver.runner.jumps = caching == (depth == 1)
    doomed: set[str] = set()
    driver.runner.fails = lambda request_id: request_id in doomed and rng.random() < 0.2
    for turn in range(600):
        for _ in range(5):
            number = len(driver.accepted)
            prompt = [rng.randrange(3)] * rng.choice([0, 20, 66]) + [rng.randrange(4) for _ in range(rng.randint(1, 8))]
            deadline_s = driver.now + rng.random() if rng.random() < 0.1 else None
            driver.add(
                EngineRequest(
                    request_id=f"r{number}",
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(),
                    max_tokens=rng.randint(1, 24),
                    stop_token_ids=(rng.randrange(VOCAB_SIZE),),
                    arrival_s=driver.now,
                    deadline_s=deadline_s,
                )
            )
            if rng.random() < 0.05:
                doomed.add(f"r{number}")
        if turn % 3 == 0:
            live = [request_id for request_id in driver.accepted if request_id not in driver.final]
            chosen = rng.sample(live, min(2, len(live)))
            driver.collect(driver.scheduler.abort(chosen, FinishReason.ABORT, driver.now))
        driver.step()
    driver.drain()
    stats = driver.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.num_rejected > 0
    assert (stats.num_cached_prompt_tokens > 0) == caching
    assert (stats.num_host_hit_tokens > 0) == (stats.num_restored_blocks > 0) == (num_host_blocks > 0)
    reasons = {output.finish_reason for output in driver.final.values()}
    assert reasons == set(FinishReason)


def random_request(rng: random.Random, driver: Driver) -> EngineRequest:
    prompt = [rng.randrange(3)] * rng.choice([0, 6, 20, 66]) + [rng.randrange(4) for _ in range(rng.randint(1, 8))]
    return EngineRequest(
        request_id=f"r{len(driver.accepted)}",
        prompt_token_ids=prompt,
        sampling=SamplingParams(prompt_logprobs=rng.choice([None, None, None, 0])),
        max_tokens=rng.randint(1, 100 - len(prompt)) if rng.random() < 0.5 else rng.randint(1, 10),
        stop_token_ids=(rng.randrange(VOCAB_SIZE),),
        arrival_s=driver.now,
        priority=rng.choice([-1, 0, 1, BACKGROUND_PRIORITY]),
        namespace=rng.choice(["", "", "tenant"]),
        deadline_s=driver.now + rng.random() if rng.random() < 0.05 else None,
    )


@pytest.mark.parametrize("seed", range(10))
def test_random_traffic_in_random_configurations(seed: int) -> None:
    """Pools that hold between one and four of the longest requests, so blocks run out all the time."""
    rng = random.Random(seed)
    config = SchedulerConfig(
        max_num_seqs=rng.choice([2, 6, 16]),
        max_num_batched_tokens=rng.choice([4, 16, 64, 300]),
        max_model_len=100,
        max_num_queued_requests=40,
        max_num_queued_tokens=20_000,
        watermark_blocks=rng.choice([0, 0, 2]),
        max_preemptions=rng.choice([0, 1, 2]),
        policy=rng.choice(["fcfs", "priority"]),
        target_step_s=rng.choice([0.0, 0.02]),
    )
    pool = rng.choice([26, 30, 45, 60, 100])
    driver = Driver(rng.choice([1, 2]), pool, rng.random() < 0.8, config, rng.choice([0, 10, 60]))
    driver.runner.jumps = rng.random() < 0.5
    doomed: set[str] = set()
    driver.runner.fails = lambda request_id: request_id in doomed and rng.random() < 0.2
    for _ in range(200):
        for _ in range(rng.choice([0, 0, 1, 3, 6])):
            request = random_request(rng, driver)
            driver.add(request)
            if rng.random() < 0.03:
                doomed.add(request.request_id)
        if rng.random() < 0.1:
            live = [request_id for request_id in driver.accepted if request_id not in driver.final]
            chosen = rng.sample(live, min(2, len(live)))
            driver.collect(driver.scheduler.abort(chosen, FinishReason.ABORT, driver.now))
        driver.step()
    driver.drain()
