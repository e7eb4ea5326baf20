"""The simulator: the real scheduler on simulated time, against runs that can be computed by hand."""

from __future__ import annotations

import math
import random
from pathlib import Path

import msgspec
import pytest

from penstock.base.errors import ConfigError
from penstock.bench.datasets import Shape, conversations, prefix_tree, random_prompts
from penstock.bench.measure import Workload
from penstock.bench.metrics import Summary, summarise
from penstock.bench.plan import PlannedRequest
from penstock.bench.prompts import PromptMaker
from penstock.bench.simulator import SimulatedEngine, Simulation, run_simulation
from penstock.bench.step_time import (
    FittedStepTime,
    HardwareStepTime,
    Profile,
    StepWork,
    fit_step_time,
    load_profile,
)
from penstock.config.engine import CacheConfig, SchedulerConfig
from penstock.messages import ScheduledRequest, SchedulerOutput

MAKER = PromptMaker(as_chat=False)


def model(step_s: float = 0.01, token_s: float = 0.0, host_s: float = 0.0) -> FittedStepTime:
    """step_s a step, and token_s for each token beyond the first."""
    coefficients = [step_s, token_s, 0, 0, 0, 0, 0, 0]
    return FittedStepTime(coefficients=coefficients, host_s=host_s, frontend_s=0.0, error=0.0, num_steps=0)


def engine(num_blocks: int = 4096, max_num_seqs: int = 64, budget: int = 512, **more: object) -> SimulatedEngine:
    scheduler = SchedulerConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, max_model_len=8192, max_num_queued_requests=100_000,
        max_num_queued_tokens=100_000_000, watermark_blocks=max(1, num_blocks // 100), **more,  # type: ignore[arg-type]
    )  # fmt: skip
    return SimulatedEngine(CacheConfig(block_size=16, num_blocks=num_blocks), scheduler)


def play(
    plan: list[PlannedRequest], on: SimulatedEngine, concurrency: int | None = None, step: FittedStepTime | None = None
) -> tuple[Summary, Simulation]:
    found = run_simulation(on, step or model(), Workload(lambda _seed: plan, concurrency), 1)
    return summarise(found.record), found


def test_a_single_request_by_hand() -> None:
    """Prefill of 1,000 tokens in steps of 512 tokens: two steps, then one a token, none of them waiting for Python."""
    plan = [PlannedRequest(list(range(1000)), 1000, 5, at_s=0.0)]
    summary, found = play(plan, engine())
    assert summary.latency["ttft"].at(0.5).value == pytest.approx(0.02)
    assert summary.latency["itl"].at(0.5).value == pytest.approx(0.01)
    assert summary.latency["e2e"].at(0.5).value == pytest.approx(0.06)
    assert found.num_steps == 6
    assert found.busy_share == pytest.approx(1.0)


def test_a_batch_shares_its_steps() -> None:
    plan = list(random_prompts(Shape(8, 10), MAKER, 64, 1))
    summary, found = play(plan, engine(), concurrency=32)
    # 32 users, two rounds: prefill and nine decodes each; the second round begins while the last step is in flight.
    assert found.num_steps == pytest.approx(20, abs=3)
    assert summary.output_token_rate == pytest.approx(640 / (found.num_steps * 0.01), rel=0.01)
    assert summary.num_succeeded == 64


def test_shared_prefixes_are_hit() -> None:
    plan = list(prefix_tree(Shape(16, 4, levels=((512, 1),)), MAKER, 50, 1))
    summary, _ = play(plan, engine(), concurrency=1)
    assert summary.cached_tokens == pytest.approx(49 * 512, rel=0.01)


def test_conversations_hit_what_was_said() -> None:
    plan = list(conversations(Shape(64, 64, turns=4, think_s=0.0), PromptMaker(as_chat=True), 40, 1))
    summary, _ = play(plan, engine(), concurrency=2)
    # Of a turn the whole blocks of all that was computed before are cached: 127, 255 and 383 tokens.
    assert summary.prompt_tokens == 10 * (64 + 192 + 320 + 448)
    assert summary.cached_tokens == pytest.approx(10 * (112 + 240 + 368))


def test_queues_overflow_as_in_the_server() -> None:
    on = engine(max_num_seqs=1)
    on = SimulatedEngine(on.cache, msgspec.structs.replace(on.scheduler, max_num_queued_requests=5))
    plan = [PlannedRequest([index], 1, 100, index, at_s=0.0) for index in range(20)]
    summary, _ = play(plan, on)
    assert summary.failures == {"status 429": 20 - 5}


def test_preemption_and_cancels_end_well() -> None:
    plan = list(random_prompts(Shape(100, 200, spread=0.5), MAKER, 60, 1))
    for request in plan[::7]:
        request.cancel_after_s = 0.5
    summary, _ = play(plan, engine(num_blocks=120), concurrency=30)
    assert summary.num_failed == 0
    assert summary.num_cancelled == len(plan[::7])


def test_a_thousand_times_faster_than_the_hour_it_plays() -> None:
    """The figure itself is measured elsewhere; here only that an hour does not take minutes."""
    source = random.Random(1)
    plan = list(random_prompts(Shape(200, 60), MAKER, 1000, 1))
    at_s = 0.0
    for request in plan:
        at_s += source.expovariate(1 / 3.6)
        request.at_s = at_s
    summary, found = play(plan, engine(), step=model(0.05, 0.001))
    assert summary.num_succeeded == 1000
    assert summary.duration_s > 3000
    assert found.speedup > 50


def test_the_work_of_a_step() -> None:
    shares = [ScheduledRequest("a", 9, 1, [], True), ScheduledRequest("b", 16, 3, [], False)]
    work = StepWork.of(SchedulerOutput(1, shares, [], [], [], 4))
    assert work == StepWork(4, 1, 10, 17 + 18 + 19)


def made_up_steps(count: int, noise: float) -> list[tuple[StepWork, float]]:
    source = random.Random(3)
    steps = []
    for _ in range(count):
        tokens = source.choice((1, 2, 8, 32, 128, 512))
        work = StepWork(tokens, min(tokens, 8), source.randrange(20_000), source.randrange(100_000))
        seconds = 0.004 + 2e-5 * max(0, tokens - 16) + 1e-4 * work.num_sampled + 1e-7 * work.decode_context
        steps.append((work, seconds * source.uniform(1 - noise, 1 + noise)))
    return steps


def test_the_fit_finds_what_steps_cost() -> None:
    exact = fit_step_time(made_up_steps(300, 0.0), 0.001, 0.002)
    for work, seconds in made_up_steps(50, 0.0):
        assert exact.seconds(work) == pytest.approx(seconds, rel=0.01)
    noisy = fit_step_time(made_up_steps(2000, 0.2), 0.001, 0.002)
    assert noisy.error == pytest.approx(0.1, abs=0.03)
    assert min(noisy.coefficients) >= 0
    disturbed = [(work, seconds * (20 if index % 10 == 0 else 1)) for index, (work, seconds) in
                 enumerate(made_up_steps(500, 0.0))]  # fmt: skip
    robust = fit_step_time(disturbed, 0.001, 0.002)
    work, seconds = made_up_steps(1, 0.0)[0]
    assert robust.seconds(work) == pytest.approx(seconds, rel=0.3)
    with pytest.raises(ConfigError, match="too few"):
        fit_step_time(made_up_steps(5, 0.0), 0.0, 0.0)


def test_a_machine_from_its_limits() -> None:
    """1e9 weights of two bytes at 100 GB/s: 20 ms for one token, 2 x 1e9 x 1000 / 1e12 = 2 s for a thousand."""
    machine = HardwareStepTime(100e9, 1e12, 2e9, 1e9, 1e5, 1e6, efficiency=1.0)
    assert machine.seconds(StepWork(1, 1, 0, 0)) == pytest.approx(0.02)
    assert machine.seconds(StepWork(1000, 1, 0, 0)) == pytest.approx(2.0)
    assert machine.seconds(StepWork(1, 1, 10_000, 0)) == pytest.approx(0.02 + 0.01)
    assert math.isfinite(machine.seconds(StepWork(1, 1, 0, 10**9)))


def test_profiles_are_files(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(msgspec.json.encode(Profile(step_time=model(), num_blocks=9, block_size=16, max_model_len=99)))
    assert load_profile(path).step_time == model()
    path.write_text("{}")
    with pytest.raises(ConfigError, match="no step profile"):
        load_profile(path)
