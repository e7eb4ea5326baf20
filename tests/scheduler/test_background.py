"""Background work beside others: what a step leaves it, and what it gives up."""

from __future__ import annotations

from typing import Any

from scheduling import planned, request_of, result_of, scheduler_of, shares, step

from penstock.messages import EngineRequest, FinishReason, SchedulerOutput
from penstock.messages.bounds import BACKGROUND_PRIORITY
from penstock.scheduler import Scheduler
from penstock.scheduler.background_pace import SLOWDOWN, UNWATCHED_STEP_S, WATCH_S


def background_of(request_id: str, prompt: list[int], max_tokens: int = 60) -> EngineRequest:
    return request_of(request_id, prompt, max_tokens, priority=BACKGROUND_PRIORITY)


def watched(num_background: int = 4, **changes: Any) -> Scheduler:
    """Background requests and one of somebody's, all decoding; nothing in flight, and no limit learnt."""
    settings = {"max_model_len": 700, "max_num_batched_tokens": 600, "target_step_s": 0.25} | changes
    scheduler, _ = scheduler_of(200, **settings)
    for number in range(num_background):
        scheduler.add(background_of(f"b{number}", [100 + number], 400), 0.0)
    step(scheduler)
    scheduler.add(request_of("a", [1, 2, 3], 400), 0.0)
    step(scheduler)
    return scheduler


def timed_step(scheduler: Scheduler, fixed_s: float, per_token_s: float, now: float = 0.0) -> SchedulerOutput:
    plan = planned(scheduler, now)
    result = result_of(plan)
    result.seconds = fixed_s + per_token_s * plan.num_tokens
    scheduler.update(plan, result, now)
    return plan


def test_a_step_with_a_prompt_has_no_background_work() -> None:
    scheduler = watched()
    step(scheduler)
    assert len(shares(planned(scheduler))) > 1
    scheduler.add(request_of("c", list(range(40))), 0.0)
    assert [name for name, *_ in shares(planned(scheduler))] == ["a", "c"]


def test_where_rows_are_nearly_free_all_share_and_where_they_are_not_few_do() -> None:
    for per_token_s, most, least in ((0.0001, 9, 8), (0.01, 2, 1)):
        scheduler = watched(8, max_num_seqs=16)
        sizes = [timed_step(scheduler, 0.02, per_token_s).num_tokens for _ in range(100)]
        assert least <= max(sizes[-40:]) <= most
        assert sizes[-40:].count(1), "now and then others have a step alone, to compare with"


def test_shared_steps_stay_near_those_of_others_alone() -> None:
    scheduler = watched(8, max_num_seqs=16)
    for _ in range(60):
        timed_step(scheduler, 0.02, 0.001)
    taken_s = [0.02 + 0.001 * timed_step(scheduler, 0.02, 0.001).num_tokens for _ in range(96)]
    assert max(taken_s) < 0.021 * (SLOWDOWN + 0.06)
    assert sum(taken_s) > 96 * 0.024, "background work gets on"


def test_background_work_is_not_planned_ahead_while_somebody_may_come() -> None:
    scheduler = watched()
    scheduler.abort(["a"], FinishReason.ABORT, 0.0)
    plan = planned(scheduler, 1.0)
    assert [name for name, *_ in shares(plan)] == ["b0"]
    assert scheduler.schedule(1.0) is None
    scheduler.update(plan, result_of(plan), 1.0)
    assert scheduler.schedule(1.0) is not None
    assert planned(scheduler, WATCH_S).num_tokens == 4
    assert planned(scheduler, WATCH_S).num_tokens == 4


def test_unwatched_prompts_come_in_chunks_of_a_short_step() -> None:
    scheduler, _ = scheduler_of(2000, max_model_len=7000, max_num_batched_tokens=6000, max_num_queued_tokens=7000,
                                target_step_s=0.25)  # fmt: skip
    scheduler.add(background_of("b", [number % 50 for number in range(5000)]), 0.0)
    taken_s = []
    while scheduler._running or not taken_s:
        taken_s.append(0.0001 * timed_step(scheduler, 0.0, 0.0001).num_tokens)
        if taken_s[-1] < 0.001:
            break
    assert max(taken_s[1:]) < 1.1 * UNWATCHED_STEP_S


def test_whoever_waits_gets_the_row_of_background_work() -> None:
    scheduler = watched(3, max_num_seqs=4)
    scheduler.add(request_of("c", [7, 8], 2), 0.0)
    names = [name for name, *_ in shares(planned(scheduler))]
    assert names == ["a", "c"]
    assert sorted(request.request_id for request in scheduler._running) == ["a", "b0", "b1", "c"]
    (lost,) = (request for request in scheduler._requests.values() if request.table is None)
    assert (lost.request_id, lost.num_preemptions, lost.gives_way) == ("b2", 0, True)


def test_whoever_waits_gets_the_blocks_of_background_work() -> None:
    scheduler, kv = scheduler_of(12, caching=False, max_num_batched_tokens=64, target_step_s=0.25)
    for name in ("b0", "b1"):
        scheduler.add(background_of(name, [*range(18)], 20), 0.0)  # five blocks each
    step(scheduler)
    scheduler.add(request_of("c", [*range(30, 60)], 2), 0.0)
    while "c" not in {request.request_id for request in scheduler._running}:
        step(scheduler)
    assert kv.num_tables == 1
    for _ in range(60):
        step(scheduler)
        if not scheduler.has_work():
            break
    assert not scheduler.has_work(), "they come back when there is room"


def test_nobody_waits_for_a_prefix_that_background_work_computes() -> None:
    scheduler, _ = scheduler_of(400, max_model_len=700, max_num_batched_tokens=100, target_step_s=0.25)
    prompt = list(range(300))
    scheduler.add(background_of("b", prompt), 0.0)
    first = planned(scheduler)
    assert [name for name, *_ in shares(first)] == ["b"]
    scheduler.add(request_of("a", [*prompt, 1]), 0.0)
    assert [name for name, *_ in shares(planned(scheduler))] == ["a"]
