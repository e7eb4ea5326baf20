"""The simulator: the real scheduler on simulated time, against runs that can be computed by hand."""

from __future__ import annotations

import math
import random
import signal
from array import array
from pathlib import Path

import msgspec
import pytest

from penstock.base.errors import ConfigError
from penstock.bench.calibration import fit_frontend
from penstock.bench.datasets import Shape, conversations, prefix_tree, random_prompts
from penstock.bench.measure import Workload
from penstock.bench.metrics import Summary, summarise
from penstock.bench.observation import Observation
from penstock.bench.plan import PlannedRequest
from penstock.bench.prompts import PromptMaker
from penstock.bench.simulator import SimulatedEngine, Simulation, run_simulation
from penstock.bench.step_time import (
    FittedStepTime,
    Frontend,
    HardwareStepTime,
    Profile,
    fit_step_time,
    load_profile,
)
from penstock.config.engine import CacheConfig, SchedulerConfig
from penstock.engine.step_log import LoggedStep, StepWork
from penstock.messages import ScheduledRequest, SchedulerOutput

MAKER = PromptMaker(as_chat=False)


def model(step_s: float = 0.01, token_s: float = 0.0, host_s: float = 0.0) -> FittedStepTime:
    """step_s a step, and token_s for each token beyond the first."""
    coefficients = [step_s, token_s, 0, 0, 0, 0, 0, 0]
    return FittedStepTime(coefficients=coefficients, host_s=host_s, error=0.0, num_steps=0)


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
    # Now and then two conversations begin with the same word.
    assert summary.cached_tokens == pytest.approx(10 * (112 + 240 + 368), abs=10)


def test_queues_overflow_as_in_the_server() -> None:
    on = engine(max_num_seqs=1)
    on = SimulatedEngine(on.cache, msgspec.structs.replace(on.scheduler, max_num_queued_requests=5))
    plan = [PlannedRequest([index], 1, 100, index, at_s=0.0 if index == 0 else 0.05) for index in range(20)]
    summary, _ = play(plan, on)
    assert summary.failures == {"status 429": 20 - 1 - 5}  # one runs, five wait


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


def test_what_a_run_returns_is_not_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio.Runner takes the repr of the main task, twice: of a record's every request that was half of the time."""
    spelled_out: list[Observation] = []
    monkeypatch.setattr(Observation, "__repr__", lambda seen: spelled_out.append(seen) or "")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        play([PlannedRequest([1, 2, 3], 3, 4)], engine())
    finally:
        signal.signal(signal.SIGINT, before)
    assert not spelled_out


def test_the_work_of_a_step() -> None:
    shares = [ScheduledRequest("a", 9, 1, [], True), ScheduledRequest("b", 16, 3, [], False)]
    work = StepWork.of(SchedulerOutput(1, shares, [], [], [], 4))
    assert work == StepWork(4, 1, 10, 17 + 18 + 19)


def made_up_steps(count: int, noise: float, disturbed: int = 0) -> list[LoggedStep]:
    """One after another, 1 ms of Python between two. Each `disturbed`-th takes 20 times as long."""
    source = random.Random(3)
    steps: list[LoggedStep] = []
    now_s = 100.0
    for _ in range(count):
        tokens = source.choice((1, 2, 8, 32, 128, 512))
        work = StepWork(tokens, min(tokens, 8), source.randrange(20_000), source.randrange(100_000))
        seconds = 0.004 + 2e-5 * max(0, tokens - 16) + 1e-4 * work.num_sampled + 1e-7 * work.decode_context
        seconds *= source.uniform(1 - noise, 1 + noise) * (20 if disturbed and len(steps) % disturbed == 0 else 1)
        steps.append(LoggedStep(now_s, seconds, work))
        now_s += seconds + 0.0005
    return steps


def test_the_fit_finds_what_steps_cost() -> None:
    exact = fit_step_time(made_up_steps(300, 0.0))
    for step in made_up_steps(50, 0.0):
        assert exact.seconds(step.work) == pytest.approx(step.seconds, rel=0.01)
    assert exact.host_s == pytest.approx(0.0005)
    noisy = fit_step_time(made_up_steps(2000, 0.2))
    assert noisy.error == pytest.approx(0.1, abs=0.03)
    assert min(noisy.coefficients) >= 0
    robust = fit_step_time(made_up_steps(500, 0.0, disturbed=10))
    step = made_up_steps(1, 0.0)[0]
    assert robust.seconds(step.work) == pytest.approx(step.seconds, rel=0.3)
    with pytest.raises(ConfigError, match="too few"):
        fit_step_time(made_up_steps(5, 0.0))


def test_the_fit_keeps_how_steps_vary() -> None:
    """Uniform noise of 20 % comes back as it was; a tenth of steps that take 20 times as long stays a tenth."""
    work = StepWork(8, 8, 1000, 0)
    noisy = fit_step_time(made_up_steps(3000, 0.2))
    drawn = [noisy.draw(work, (index + 0.5) / 100, 0.0) for index in range(100)]
    true_s = 0.004 + 8e-4 + 1e-4
    assert drawn[5] == pytest.approx(true_s * 0.82, rel=0.04)
    assert drawn[95] == pytest.approx(true_s * 1.18, rel=0.04)
    disturbed = fit_step_time(made_up_steps(3000, 0.0, disturbed=10))
    shares = [disturbed.draw(work, (index + 0.5) / 100, 0.0) / true_s for index in range(100)]
    assert sum(share > 10 for share in shares) == pytest.approx(10, abs=3)


def test_a_step_that_found_the_device_idle() -> None:
    steps = []
    now_s = 0.0
    for index in range(200):
        is_first = index % 4 == 0
        now_s += 0.05 if is_first else 0.0001
        size = 1 + index % 3
        seconds = 0.001 * (is_first + 1 + size)
        steps.append(LoggedStep(now_s, seconds, StepWork(size, 1, 0, 0)))
        now_s += seconds
    found = fit_step_time(steps)
    work = StepWork(1, 1, 0, 0)
    assert found.seconds(work) == pytest.approx(0.002, rel=0.01)
    assert found.draw(work, 0.5, 0.05) == pytest.approx(0.003, rel=0.01)
    assert found.draw(StepWork(3, 1, 0, 0), 0.5, 0.05) == pytest.approx(0.005, rel=0.01)
    assert found.draw(work, 0.5, 0.001) == pytest.approx(0.002, rel=0.01)
    assert found.host_s == pytest.approx(0.0001)
    plan = [PlannedRequest([index], 1, 2, index, at_s=float(index)) for index in range(20)]
    summary, _ = play(plan, engine(), step=msgspec.structs.replace(found, spreads=[]))
    assert summary.latency["ttft"].at(0.5).value == pytest.approx(0.0031, rel=0.05)


def test_what_stands_before_the_engine() -> None:
    """The first of two outputs of a step is with its client 1 ms after it, the second 3 ms after."""
    frontend = Frontend(request_s=0.01, prompt_token_s=0.001, output_s=0.001, next_output_s=0.002)
    plan = [PlannedRequest([1] * 10, 10, 2, 0, at_s=0.0), PlannedRequest([2] * 10, 10, 2, 1, at_s=0.0)]
    _, found = play(plan, engine(), step=msgspec.structs.replace(model(0.1), frontend=frontend))
    first, second = sorted(found.record.observations, key=lambda seen: seen.request.index)
    assert first.chunk_s[0] - first.intended_s == pytest.approx(0.02 + 0.1 + 0.001)
    # Both were in the inbox before the step.
    assert second.chunk_s[0] - second.intended_s == pytest.approx(0.02 + 0.1 + 0.003)


def test_a_frontend_is_found_again(tmp_path: Path) -> None:
    """Requests of one user: 2 ms and 5 us a token to the engine, 0.4 ms back, 0.1 ms more for each further output."""
    source = random.Random(1)
    steps, alone = [], []
    now_s = 10.0
    for index in range(40):
        length = source.randrange(10, 500)
        request = PlannedRequest([1] * length, length, 2, index)
        start_s = now_s + 0.002 + 5e-6 * length
        steps += [
            LoggedStep(start_s, 0.01, StepWork(length, 1, 0, 9)),
            LoggedStep(start_s + 0.01, 0.005, StepWork(1, 1, 9, 0)),
        ]
        chunks = array("d", [start_s + 0.0104, start_s + 0.0154])
        alone.append(Observation(request, now_s, ended_s=chunks[-1], prompt_tokens=length, chunk_s=chunks))
        now_s = start_s + 0.1
    together = []
    for _ in range(100):
        steps.append(LoggedStep(now_s, 0.01, StepWork(4, 4, 9, 0)))
        chunk_s = [now_s + 0.0104 + 0.0001 * place for place in range(4)]
        together += [
            Observation(PlannedRequest([1], 1, 1), now_s, ended_s=one, prompt_tokens=1, chunk_s=array("d", [one]))
            for one in chunk_s
        ]
        now_s += 0.02
    found = fit_frontend(steps, [*alone, *together])
    assert found.request_s == pytest.approx(0.002, rel=0.05)
    assert found.prompt_token_s == pytest.approx(5e-6, rel=0.05)
    assert found.output_s == pytest.approx(0.0004, rel=0.05)
    assert found.next_output_s == pytest.approx(0.0001, rel=0.05)
    with pytest.raises(ConfigError, match="alone"):
        fit_frontend(steps, alone[:3])


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
