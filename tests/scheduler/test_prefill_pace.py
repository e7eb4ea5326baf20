"""The limit on prefill beside decodes, learnt from steps of known cost."""

import pytest
from scheduling import planned, request_of, result_of, scheduler_of

from penstock.scheduler.prefill_pace import PrefillPace


def run_steps(pace: PrefillPace, fixed_s: float, per_token_s: float, count: int = 30) -> float:
    """Steps full of prefill on a machine of that speed; the duration of the last."""
    seconds = 0.0
    for _ in range(count):
        seconds = fixed_s + per_token_s * pace.limit
        pace.observe(pace.limit, seconds)
    return seconds


@pytest.mark.parametrize(("fixed_s", "per_token_s"), [(0.0, 0.001), (0.05, 0.001), (0.0, 0.00001), (0.05, 0.004)])
def test_mixed_steps_approach_the_target_on_any_machine(fixed_s: float, per_token_s: float) -> None:
    pace = PrefillPace(target_s=0.2)
    assert run_steps(pace, fixed_s, per_token_s) == pytest.approx(0.2, rel=0.05)


def test_the_target_is_at_least_twice_a_step_of_decodes() -> None:
    pace = PrefillPace(target_s=0.1)
    pace.observe(0, 0.2)
    assert run_steps(pace, 0.2, 0.001) == pytest.approx(0.4, rel=0.05)


def test_a_short_step_with_little_prefill_does_not_lower_the_limit() -> None:
    pace = PrefillPace(target_s=0.2)
    before = pace.limit
    pace.observe(3, 0.15)
    assert pace.limit == before
    pace.observe(3, 0.3)
    assert pace.limit == before // 2


def test_some_prefill_always_remains() -> None:
    pace = PrefillPace(target_s=0.001)
    run_steps(pace, 1.0, 1.0)
    assert pace.limit == 16


def test_the_limit_binds_only_beside_decodes() -> None:
    scheduler, _ = scheduler_of(200, max_model_len=700, max_num_batched_tokens=600, target_step_s=0.1)
    scheduler.add(request_of("a", list(range(400))), 0.0)
    plan = planned(scheduler)
    assert plan.num_tokens == 400
    scheduler.update(plan, result_of(plan), 0.0)
    scheduler.abort(["a"], "abort", 0.0)  # type: ignore[arg-type]
    scheduler.add(request_of("b", [1]), 0.0)
    plan = planned(scheduler)
    result = result_of(plan)
    result.seconds = 0.4
    scheduler.update(plan, result, 0.0)
    scheduler.add(request_of("c", list(range(500, 900))), 0.0)
    limit = scheduler._pace.limit
    assert [share.num_tokens for share in planned(scheduler).scheduled] == [1, min(limit, 400)]
