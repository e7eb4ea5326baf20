"""Plans and outputs with exact expectations: budget, chunks, pipelining, stops, ends."""

import pytest
from scheduling import TOKEN, planned, request_of, result_of, scheduler_of, shares, step

from penstock.messages import (
    ErrorInfo,
    FinishReason,
    NewRequestData,
    RequestOutput,
    SampledTokens,
    SamplingParams,
    ScheduledRequest,
    SchedulerOutput,
    StepResult,
    TokenLogprobs,
)


def test_a_new_request_is_described_in_full_once_and_by_diffs_afterwards() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1, 2, 3, 4, 5], max_tokens=4, stop_token_ids=(7,)), 0.0)
    assert planned(scheduler) == SchedulerOutput(
        step_id=1,
        scheduled=[ScheduledRequest("a", 0, 5, [0, 1], True)],
        new_requests=[NewRequestData("a", [1, 2, 3, 4, 5], 5, SamplingParams(), (7,))],
        removed_request_ids=[],
        block_copies=[],
        num_tokens=5,
    )
    # Planned before the first step's result is known: position 5 holds the token that it draws.
    assert planned(scheduler) == SchedulerOutput(2, [ScheduledRequest("a", 5, 1, [], True)], [], [], [], 1)
    assert shares(planned(scheduler)) == [("a", 6, 1, True)]


def test_steps_are_never_planned_beyond_max_tokens() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1, 2, 3], max_tokens=2), 0.0)
    first, second = planned(scheduler), planned(scheduler)
    assert scheduler.schedule(0.0) is None
    assert scheduler.update(first, result_of(first), 1.0)[0].token_ids == [TOKEN]
    assert scheduler.schedule(0.0) is None
    (last,) = scheduler.update(second, result_of(second, a=4), 2.0)
    assert (last.token_ids, last.finish_reason, last.num_output_tokens) == ([4], FinishReason.LENGTH, 2)
    assert not scheduler.has_work()


def test_a_prompt_longer_than_the_budget_is_prefilled_in_chunks() -> None:
    scheduler, _ = scheduler_of(max_num_batched_tokens=8)
    scheduler.add(request_of("a", list(range(20))), 0.0)
    plans = [planned(scheduler) for _ in range(4)]
    assert [shares(plan) for plan in plans] == [
        [("a", 0, 8, False)],
        [("a", 8, 8, False)],
        [("a", 16, 4, True)],
        [("a", 20, 1, True)],
    ]
    assert [plan.scheduled[0].new_block_ids for plan in plans] == [[0, 1, 2, 3, 4], [], [], [5]]
    for plan in plans[:2]:
        assert scheduler.update(plan, result_of(plan), 0.0) == []


def test_decodes_come_first_then_running_prefills_then_new_requests() -> None:
    scheduler, _ = scheduler_of(max_num_batched_tokens=10)
    scheduler.add(request_of("a", [1, 2]), 0.0)
    step(scheduler)
    scheduler.add(request_of("b", list(range(10, 25))), 0.0)
    scheduler.add(request_of("c", [31, 32, 33]), 0.0)
    assert shares(planned(scheduler)) == [("a", 2, 1, True), ("b", 0, 9, False)]
    assert shares(planned(scheduler)) == [("a", 3, 1, True), ("b", 9, 6, True), ("c", 0, 3, True)]
    assert shares(planned(scheduler)) == [("a", 4, 1, True), ("b", 15, 1, True), ("c", 3, 1, True)]


def test_a_long_prompt_takes_no_step_from_streams() -> None:
    scheduler, _ = scheduler_of(max_num_batched_tokens=6, max_num_seqs=4)
    for name in "abc":
        scheduler.add(request_of(name, [ord(name)], max_tokens=30), 0.0)
    step(scheduler)
    scheduler.add(request_of("long", list(range(50))), 0.0)
    for turn in range(17):
        plan = planned(scheduler)
        assert [share[0] for share in shares(plan)] == ["a", "b", "c", "long"]
        assert shares(plan)[3][1:3] == (turn * 3, 3 if turn < 16 else 2)
        scheduler.update(plan, result_of(plan), 0.0)


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler, _ = scheduler_of(max_num_seqs=2)
    for name in "abc":
        scheduler.add(request_of(name, [ord(name)], max_tokens=1), 0.0)
    assert [share[0] for share in shares(planned(scheduler))] == ["a", "b"]
    assert scheduler.schedule(0.0) is None
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)


def test_a_budget_smaller_than_max_num_seqs_still_gives_every_running_request_a_token() -> None:
    scheduler, _ = scheduler_of(max_num_seqs=8, max_num_batched_tokens=2)
    for name in "abc":
        scheduler.add(request_of(name, [ord(name)], max_tokens=3), 0.0)
    for _ in range(3):
        assert [share[0] for share in shares(planned(scheduler))] == ["a", "b"]


def test_a_stop_token_ends_the_request_is_not_text_and_discards_what_was_planned_after_it() -> None:
    scheduler, kv = scheduler_of()
    scheduler.add(request_of("a", [1, 2, 3], stop_token_ids=(7,)), 0.0)
    first, second = planned(scheduler), planned(scheduler)
    third = planned(scheduler)
    scheduler.update(first, result_of(first, a=5), 0.0)
    (last,) = scheduler.update(second, result_of(second, a=7), 0.0)
    assert (last.token_ids, last.stop_token_id, last.finish_reason) == ([], 7, FinishReason.STOP)
    assert last.num_output_tokens == 1
    assert kv.num_available == kv.num_blocks
    assert scheduler.update(third, result_of(third), 0.0) == []
    assert not scheduler.has_work()


def test_a_stop_token_below_min_tokens_is_an_ordinary_token() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1], stop_token_ids=(7,), sampling=SamplingParams(min_tokens=2)), 0.0)
    assert [step(scheduler, a=7)[0].token_ids for _ in range(2)] == [[7], [7]]
    assert step(scheduler, a=7)[0].stop_token_id == 7


def test_an_ended_request_is_named_to_the_runner_in_the_next_plan_only() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1], max_tokens=1), 0.0)
    step(scheduler)
    assert scheduler.schedule(0.0) is None
    scheduler.add(request_of("b", [2]), 0.0)
    assert planned(scheduler).removed_request_ids == ["a"]
    assert planned(scheduler).removed_request_ids == []


def test_an_error_ends_one_request_and_no_other() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1]), 0.0)
    scheduler.add(request_of("b", [2]), 0.0)
    plan = planned(scheduler)
    result = result_of(plan)
    error = ErrorInfo("x", 500, "y")
    del result.sampled["a"]
    result.errors["a"] = error
    outputs = scheduler.update(plan, result, 0.0)
    assert [(output.request_id, output.finish_reason, output.error) for output in outputs] == [
        ("a", FinishReason.ERROR, error),
        ("b", None, None),
    ]
    assert shares(planned(scheduler)) == [("b", 1, 1, True)]


def test_what_a_failed_step_wrote_is_not_cached() -> None:
    scheduler, kv = scheduler_of(max_num_batched_tokens=4)
    scheduler.add(request_of("a", [1, 2, 3, 4, 5, 6, 7, 8, 9]), 0.0)
    step(scheduler)
    plan = planned(scheduler)
    scheduler.update(plan, StepResult(plan.step_id, {}, {}, {"a": ErrorInfo("x", 500, "y")}, 0.0), 0.0)
    assert kv.stats().num_cached_blocks == 1


def test_a_token_that_the_runner_lost_is_an_error_of_that_request() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1]), 0.0)
    plan = planned(scheduler)
    (last,) = scheduler.update(plan, StepResult(plan.step_id, {}, {}, {}, 0.0), 0.0)
    assert last.finish_reason is FinishReason.ERROR
    assert last.error is not None
    assert last.error.status == 500


def test_fail_all_ends_everything_once() -> None:
    scheduler, kv = scheduler_of(max_num_seqs=1)
    scheduler.add(request_of("a", [1]), 0.0)
    scheduler.add(request_of("b", [2]), 0.0)
    plan = planned(scheduler)
    outputs = scheduler.fail_all(ErrorInfo("engine_dead", 503, "gone"))
    assert [(output.request_id, output.finish_reason) for output in outputs] == [
        ("a", FinishReason.ERROR),
        ("b", FinishReason.ERROR),
    ]
    assert not scheduler.has_work()
    assert kv.num_free == kv.num_blocks
    assert scheduler.update(plan, result_of(plan), 0.0) == []


def test_prompt_logprobs_are_collected_over_chunks_and_delivered_once() -> None:
    scheduler, _ = scheduler_of(max_num_batched_tokens=4)
    scheduler.add(request_of("a", [1, 2, 3, 4, 5, 6], sampling=SamplingParams(prompt_logprobs=0)), 0.0)
    entries = [TokenLogprobs(token, -float(token), 1) for token in (2, 3, 4, 5, 6)]
    plan = planned(scheduler)
    assert scheduler.update(plan, StepResult(plan.step_id, {}, {"a": entries[:4]}, {}, 0.0), 0.0) == []
    plan = planned(scheduler)
    result = StepResult(plan.step_id, {"a": SampledTokens([8])}, {"a": entries[4:]}, {}, 0.0)
    (first,) = scheduler.update(plan, result, 0.0)
    assert first.prompt_logprobs == entries
    assert step(scheduler)[0].prompt_logprobs is None


def test_a_request_with_prompt_logprobs_computes_all_of_its_prompt() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1, 2, 3, 4, 5], max_tokens=1), 0.0)
    step(scheduler)
    scheduler.add(request_of("b", [1, 2, 3, 4, 5], sampling=SamplingParams(prompt_logprobs=0)), 0.0)
    assert shares(planned(scheduler)) == [("b", 0, 5, True)]


def test_logprobs_and_timings_are_passed_on() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1, 2], max_tokens=2, arrival_s=1.0), 1.5)
    plan = planned(scheduler, 2.0)
    entry = TokenLogprobs(5, -0.5, 1)
    (first,) = scheduler.update(plan, StepResult(1, {"a": SampledTokens([5], [entry])}, {}, {}, 0.0), 3.0)
    assert first == RequestOutput("a", [5], [entry], num_prompt_tokens=2, num_output_tokens=1)
    (last,) = step(scheduler, 4.0)
    assert last.timings is not None
    assert (last.timings.arrival_s, last.timings.scheduled_s) == (1.0, 2.0)
    assert (last.timings.first_token_s, last.timings.finished_s) == (3.0, 4.0)


def test_an_id_that_is_used_again_does_not_get_the_old_ones_tokens() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1, 2]), 0.0)
    old = planned(scheduler)
    scheduler.abort(["a"], FinishReason.ABORT, 0.0)
    scheduler.add(request_of("a", [3, 4, 5]), 0.0)
    new = planned(scheduler)
    assert new.removed_request_ids == ["a"]
    assert [data.token_ids for data in new.new_requests] == [[3, 4, 5]]
    assert scheduler.update(old, result_of(old, a=6), 0.0) == []
    (first,) = scheduler.update(new, result_of(new, a=8), 0.0)
    assert first.token_ids == [8]


def test_the_counters_count() -> None:
    scheduler, kv = scheduler_of()
    for name in "ab":
        scheduler.add(request_of(name, [1, 2, 3, 4, 5], max_tokens=2), 0.0)
        step(scheduler)
        step(scheduler)
    stats = scheduler.stats()
    assert (stats.num_steps, stats.num_prompt_tokens, stats.num_cached_prompt_tokens) == (4, 10, 4)
    assert (stats.num_output_tokens, stats.num_preemptions, stats.num_rejected) == (4, 0, 0)
    assert (stats.num_blocks, stats.num_free_blocks, stats.num_cached_blocks) == (32, 31, 1)
    assert stats.last_step_s == pytest.approx(0.01)
    assert kv.num_tables == 0
    step_count = stats.num_steps
    scheduler.add(request_of("c", [1]), 0.0)
    planned(scheduler)
    assert stats.num_steps == step_count, "stats() is a snapshot"
