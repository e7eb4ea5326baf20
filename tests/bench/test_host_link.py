"""The host tier on simulated time: copies by hand, and what it is worth to a workload that the device's cache loses."""

from __future__ import annotations

import pytest

from penstock.base.errors import ConfigError
from penstock.bench.host_link import HostLink
from penstock.bench.measure import Workload
from penstock.bench.metrics import Summary, summarise
from penstock.bench.plan import PlannedRequest
from penstock.bench.simulator import SimulatedEngine, Simulation, run_simulation
from penstock.bench.step_time import FittedStepTime
from penstock.config.engine import CacheConfig, SchedulerConfig
from penstock.messages import BlockCopy, SchedulerOutput

STEP_TIME = FittedStepTime(coefficients=[0.01, *[0.001] * 6, 0, 0, 0, 0, 0], error=0.0, num_steps=0)
PREFIX, ROUNDS = 480, 4


def step(offloads: int = 0, restores: int = 0, *, awaits: bool = False) -> SchedulerOutput:
    copies = [BlockCopy(index, index) for index in range(max(offloads, restores))]
    return SchedulerOutput(
        0, [], [], [], [], 1, offloads=copies[:offloads], restores=copies[:restores], awaits_restores=awaits
    )


def test_copies_by_hand() -> None:
    link = HostLink(0.001)
    assert link.step_start(step(), 1.0, 0.5) == 1.0
    # Three blocks leave while the step before (till 2.0) runs: they are of the one that ended at 0.5.
    assert link.step_start(step(offloads=3), 1.1, 2.0) == 2.0
    # Twenty leave after 2.0, and this step overwrites them.
    assert link.step_start(step(offloads=20), 2.5, 2.6) == pytest.approx(2.52 + 0.08)
    # Ten return after 3.0: beside this step, which begins at once; the next one reads them.
    assert link.step_start(step(restores=10), 2.9, 3.0) == 3.0
    assert link.step_start(step(), 3.001, 3.002) == pytest.approx(3.01)
    assert link.step_start(step(), 3.1, 3.05) == 3.1
    # With nothing else to do, a step waits for its own.
    assert link.step_start(step(restores=5, awaits=True), 4.0, 3.5) == pytest.approx(4.005)
    # One queue: what returns begins after what leaves.
    assert link.step_start(step(offloads=4, restores=2, awaits=True), 5.0, 4.5) == pytest.approx(5.006)


def play(num_host_blocks: int, block_s: float = 1e-4) -> tuple[Summary, Simulation]:
    """Eight prefixes of 30 blocks in turn, over a device of 100 blocks: each is gone when its turn comes again."""
    plan = []
    for turn in range(ROUNDS):
        for prefix in range(8):
            prompt = [1000 * (prefix + 1) + index for index in range(PREFIX)] + [100_000 + 100 * turn + prefix]
            plan.append(PlannedRequest(prompt, len(prompt), 4))
    scheduler = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=512, max_model_len=2048, max_num_queued_requests=100,
        max_num_queued_tokens=1_000_000, watermark_blocks=1,
    )  # fmt: skip
    cache = CacheConfig(block_size=16, num_blocks=100, num_host_blocks=num_host_blocks)
    found = run_simulation(SimulatedEngine(cache, scheduler, block_s), STEP_TIME, Workload(lambda _: plan, 1), 1)
    return summarise(found.record), found


def test_what_the_device_gives_up_comes_back_over_the_link() -> None:
    without, _ = play(0)
    assert without.cached_tokens == 0
    summary, found = play(400)
    assert summary.num_succeeded == 8 * ROUNDS
    assert summary.cached_tokens == found.num_host_hit_tokens == (ROUNDS - 1) * 8 * PREFIX
    # A prompt that is computed takes 0.01 + 480 ms of a step. One that is copied waits for 30 blocks that leave, and as
    # many that return.
    assert without.latency["ttft"].at(0.5).value == pytest.approx(0.49, rel=0.02)
    assert summary.latency["ttft"].at(0.5).value == pytest.approx(0.01 + 60 * 1e-4, rel=0.02)
    slow, _ = play(400, block_s=0.01)
    assert slow.cached_tokens == summary.cached_tokens
    assert slow.latency["ttft"].at(0.5).value == pytest.approx(0.01 + 60 * 0.01, rel=0.02)
    small, _ = play(90)
    assert small.cached_tokens < summary.cached_tokens


def test_a_tier_needs_a_link() -> None:
    with pytest.raises(ConfigError, match="link"):
        play(10, block_s=0.0)
    for num_host_blocks in (-1, 1 << 40):
        with pytest.raises(ConfigError, match="cannot be simulated"):
            play(num_host_blocks)
