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
    NUM_COEFFICIENTS,
    WARM_S,
    Coldness,
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


def model(step_s: float = 0.01, token_s: float = 0.0) -> FittedStepTime:
    """step_s a step, and token_s for each token beyond the first."""
    coefficients = [step_s, *[token_s] * (NUM_COEFFICIENTS - 6), 0, 0, 0, 0, 0]
    return FittedStepTime(coefficients=coefficients, error=0.0, num_steps=0)


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


def made_up_steps(count: int, noise: float, disturbed: int = 0, pause_s: float = 0.0) -> list[LoggedStep]:
    """One after another. Each `disturbed`-th takes 20 times as long."""
    source = random.Random(3)
    steps: list[LoggedStep] = []
    now_s = 100.0
    for _ in range(count):
        tokens = source.choice((1, 2, 8, 32, 128, 512))
        work = StepWork(tokens, min(tokens, 8), source.randrange(20_000), source.randrange(100_000))
        seconds = 0.004 + 2e-5 * max(0, tokens - 16) + 1e-4 * work.num_sampled + 1e-7 * work.decode_context
        seconds *= source.uniform(1 - noise, 1 + noise) * (20 if disturbed and len(steps) % disturbed == 0 else 1)
        steps.append(LoggedStep(now_s, seconds, work))
        now_s += seconds + pause_s
    return steps


def test_the_fit_finds_what_steps_cost() -> None:
    exact = fit_step_time(made_up_steps(300, 0.0))
    for step in made_up_steps(50, 0.0):
        assert exact.seconds(step.work) == pytest.approx(step.seconds, rel=0.01)
    paused = fit_step_time(made_up_steps(300, 0.0, pause_s=0.0005))
    step = made_up_steps(1, 0.0)[0]
    assert paused.seconds(step.work) == pytest.approx(step.seconds + 0.0005, rel=0.01)  # pauses between them are theirs
    noisy = fit_step_time(made_up_steps(2000, 0.2))
    assert noisy.error == pytest.approx(0.1, abs=0.03)
    assert min(noisy.coefficients) >= 0
    robust = fit_step_time(made_up_steps(500, 0.0, disturbed=10))
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


def test_the_cost_of_one_token_more_may_fall() -> None:
    """Two tokens cost 1 ms more than one, and further ones nothing up to 64: no sum of growing slopes can say so."""
    steps = []
    for index in range(400):
        tokens = (1, 2, 4, 8, 16, 64)[index % 6]
        seconds = 0.001 if tokens == 1 else 0.002
        steps.append(LoggedStep(index * 0.01, seconds, StepWork(tokens, 1, 0, 0)))
    found = fit_step_time(steps)
    for tokens in (1, 2, 3, 8, 40, 64):
        assert found.seconds(StepWork(tokens, 1, 0, 0)) == pytest.approx(0.001 if tokens == 1 else 0.002, rel=0.02)


def test_how_cold_a_device_is() -> None:
    coldness = Coldness()
    assert coldness.before(5.0) == 1.0  # it has never worked
    coldness.work(WARM_S)
    assert coldness.before(5.0 + WARM_S) == pytest.approx(math.exp(-1))
    coldness.work(1.0)
    assert coldness.before(6.0 + WARM_S) == pytest.approx(0.0, abs=1e-4)
    coldness.work(0.0)
    assert coldness.before(6.0 + 2 * WARM_S) == pytest.approx(1 - math.exp(-1), rel=1e-4)
    assert coldness.before(9.0) == pytest.approx(1.0)


def test_steps_on_a_device_that_was_idle() -> None:
    """The first step after a rest takes 2 ms more, and a twentieth more of each of its tokens, where it was cold."""
    steps, truth = [], Coldness()
    now_s, source = 0.0, random.Random(1)
    for index in range(600):
        is_first = index % 4 == 0
        now_s += source.choice((0.01, 0.05, 0.2, 1.0)) if is_first else 0.002
        size = source.choice((1, 4, 8, 64))
        seconds = 0.001 * (1 + size) + truth.before(now_s) * (0.002 + 0.00005 * size)
        truth.work(seconds)
        steps.append(LoggedStep(now_s, seconds, StepWork(size, 1, 0, 0)))
        now_s += seconds
    found = fit_step_time(steps)
    work = StepWork(8, 1, 0, 0)
    assert found.seconds(work) == pytest.approx(0.009, rel=0.01)
    assert found.draw(work, 0.5, 1.0) == pytest.approx(0.009 + 0.002 + 0.0004, rel=0.02)
    assert found.draw(work, 0.5, 0.5) == pytest.approx(0.009 + 0.001 + 0.0002, rel=0.02)
    plan = [PlannedRequest([index] * 8, 8, 1, index, at_s=float(index)) for index in range(20)]
    summary, _ = play(plan, engine(), step=msgspec.structs.replace(found, spreads=[]))
    assert summary.latency["ttft"].at(0.5).value == pytest.approx(0.0114, rel=0.02)


def test_what_stands_before_the_engine() -> None:
    """It does one thing after another: the second of two requests is handed on half a request's time after the first.

    A step's outputs are with their clients 1 ms and 3 ms after it, a request's first takes 4 ms more.
    """
    frontend = Frontend(request_s=0.01, prompt_token_s=0.001, output_s=0.001, first_output_s=0.004, next_output_s=0.002)
    plan = [PlannedRequest([1] * 10, 10, 4, 0, at_s=0.0), PlannedRequest([2] * 10, 10, 2, 1, at_s=0.0)]
    _, found = play(plan, engine(), step=msgspec.structs.replace(model(0.1), frontend=frontend))
    first, second = sorted(found.record.observations, key=lambda seen: seen.request.index)
    # The first begins its steps at 20 ms. The second is there at 30 ms, when the next step is planned already.
    times = [0.12 + 0.005, 0.22 + 0.001, 0.32 + 0.001, 0.42 + 0.001]
    assert [at_s - first.intended_s for at_s in first.chunk_s] == pytest.approx(times)
    assert [at_s - second.intended_s for at_s in second.chunk_s] == pytest.approx([0.32 + 0.007, 0.42 + 0.003])


def test_a_request_comes_before_the_outputs_of_the_step_that_it_was_sent_in() -> None:
    """Sent at 60 ms, while a step lasts until 120 ms: it is in the inbox at 80 ms, before the step after the next."""
    frontend = Frontend(request_s=0.02, output_s=0.05)
    plan = [PlannedRequest([1] * 10, 10, 4, 0, at_s=0.0), PlannedRequest([2] * 10, 10, 1, 1, at_s=0.06)]
    _, found = play(plan, engine(), step=msgspec.structs.replace(model(0.1), frontend=frontend))
    second = next(seen for seen in found.record.observations if seen.request.index == 1)
    assert second.chunk_s[0] - second.intended_s == pytest.approx(0.02 + 3 * 0.1 + 0.05 - 0.06)


def test_a_front_end_that_is_behind_sends_several_tokens_at_once() -> None:
    """Steps of 10 ms with eight outputs, of which one takes 5 ms to write: every fourth step goes out."""
    frontend = Frontend(output_s=0.001, next_output_s=0.005)
    plan = [PlannedRequest([index] * 10, 10, 101, index, at_s=0.0) for index in range(8)]
    _, found = play(plan, engine(), step=msgspec.structs.replace(model(0.01), frontend=frontend))
    assert len(found.record.observations) == 8
    for seen in found.record.observations:
        assert seen.output_tokens == 101
        assert len(seen.chunk_s) == pytest.approx(101 / 4, abs=3)
        assert list(seen.chunk_s) == sorted(seen.chunk_s)
        assert seen.ended_s - seen.intended_s == pytest.approx(1.01, abs=0.06)


def test_requests_and_outputs_vary_as_they_were_seen_to() -> None:
    frontend = Frontend(request_s=0.01, output_s=0.01, request_spread=[0.5, 1.5], output_spread=[1.0, 2.0])
    plan = [PlannedRequest([index] * 10, 10, 1, index, at_s=float(index)) for index in range(400)]
    _, found = play(plan, engine(), step=msgspec.structs.replace(model(0.1), frontend=frontend))
    times_ms = [round((seen.chunk_s[0] - seen.intended_s) * 1e3) for seen in found.record.observations]
    assert sorted(set(times_ms)) == [115, 125, 135]
    assert times_ms.count(125) == pytest.approx(200, abs=40)


def test_a_frontend_is_found_again(tmp_path: Path) -> None:
    """Requests of one user: 2 ms and 5 us a token to the engine, 0.4 ms back, 0.3 ms more of a request's first, 0.1 ms
    more for each further output of a step. A fifth of the ways takes twice as long."""
    source = random.Random(1)
    steps, alone = [], []
    now_s = 10.0
    for index in range(40):
        length = source.randrange(10, 500)
        request = PlannedRequest([1] * length, length, 2, index)
        start_s = now_s + (0.002 + 5e-6 * length) * (2 if index % 5 == 0 else 1)
        steps += [
            LoggedStep(start_s, 0.01, StepWork(length, 1, 0, 9)),
            LoggedStep(start_s + 0.01, 0.005, StepWork(1, 1, 9, 0)),
        ]
        chunks = array("d", [start_s + 0.0107, start_s + 0.0154])
        alone.append(Observation(request, now_s, now_s, ended_s=chunks[-1], prompt_tokens=length, chunk_s=chunks))
        now_s = start_s + 0.1
    together = []
    for _ in range(100):
        steps.append(LoggedStep(now_s, 0.01, StepWork(4, 4, 9, 0)))
        chunk_s = [now_s + 0.0104 + 0.0001 * place for place in range(4)]
        together += [
            Observation(
                PlannedRequest([1], 1, 1),
                now_s,
                now_s,
                ended_s=one,
                prompt_tokens=1,
                chunk_s=array("d", [now_s + 0.001, one]),
            )
            for one in chunk_s
        ]
        now_s += 0.02
    found = fit_frontend(steps, [*alone, *together])
    assert found.request_s == pytest.approx(0.002, rel=0.05)
    assert found.prompt_token_s == pytest.approx(5e-6, rel=0.05)
    assert found.output_s == pytest.approx(0.0004, rel=0.05)
    assert found.next_output_s == pytest.approx(0.0001, rel=0.05)
    assert found.first_output_s == pytest.approx(0.0003, rel=0.05)
    assert found.output_spread == pytest.approx([1.0] * len(found.output_spread), rel=0.01)
    assert found.request_spread[len(found.request_spread) // 2] == pytest.approx(1.0, rel=0.05)
    assert found.request_spread[-1] == pytest.approx(2.0, rel=0.05)
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
    older = msgspec.json.decode(path.read_bytes())
    older["step_time"]["coefficients"] = [0.01] * 8
    for text in ("{}", msgspec.json.encode(older).decode()):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no step profile"):
            load_profile(path)
