"""Running out of blocks: who is preempted, how often, and why nobody waits forever."""

from scheduling import TOKEN, planned, request_of, result_of, scheduler_of, shares, step

from penstock.messages import FinishReason, NewRequestData, SamplingParams


def test_the_latest_arrival_is_preempted_and_recomputed_with_its_output() -> None:
    scheduler, kv = scheduler_of(num_blocks=4)
    scheduler.add(request_of("a", [1, 2, 3, 4, 5, 6], max_tokens=10), 0.0)
    scheduler.add(request_of("b", [11, 12, 13, 14, 15], max_tokens=4), 0.0)
    step(scheduler)
    step(scheduler)
    assert kv.num_available == 0
    in_flight = planned(scheduler)
    assert shares(in_flight) == [("a", 7, 1, True), ("b", 6, 1, True)]
    # "a" needs a third block for position 8; "b" is in flight and is preempted for it.
    plan = planned(scheduler)
    assert plan.removed_request_ids == ["b"]
    outputs = scheduler.update(in_flight, result_of(in_flight, a=21, b=22), 0.0)
    assert [output.request_id for output in outputs if output.token_ids == [22]] == ["b"], "its token still counts"
    assert scheduler.stats().num_preemptions == 1
    finished: dict[str, int] = {}
    returned: list[NewRequestData] = []
    pending = plan
    for _ in range(30):
        for output in scheduler.update(pending, result_of(pending), 0.0):
            if output.finish_reason is FinishReason.LENGTH:
                assert output.timings is not None
                finished[output.request_id] = output.timings.num_preemptions
        following = scheduler.schedule(0.0)
        scheduler.check()
        if following is None:
            break
        returned += following.new_requests
        pending = following
    assert finished == {"a": 0, "b": 1}
    assert [(data.request_id, data.token_ids) for data in returned] == [("b", [11, 12, 13, 14, 15, TOKEN, TOKEN, 22])]
    assert returned[0].num_prompt_tokens == 5


def test_priority_decides_before_arrival() -> None:
    scheduler, _ = scheduler_of(num_blocks=4, policy="priority")
    scheduler.add(request_of("low", [1, 2, 3, 4, 5], max_tokens=8, priority=1), 0.0)
    scheduler.add(request_of("high", [11, 12, 13, 14, 15], max_tokens=8, priority=0), 0.0)
    removed: list[str] = []
    while not removed:
        plan = planned(scheduler)
        removed = plan.removed_request_ids
        scheduler.update(plan, result_of(plan), 0.0)
    assert removed == ["low"]
    assert shares(plan) == [("high", 8, 1, True)]


def test_a_request_alone_with_unevictable_neighbours_preempts_itself() -> None:
    scheduler, _ = scheduler_of(num_blocks=4)
    scheduler.add(request_of("a", [1, 2, 3, 4, 5, 6, 7], max_tokens=4), 0.0)
    scheduler.add(request_of("b", [11, 12, 13, 14, 15, 16, 17, 18], max_tokens=4), 0.0)
    step(scheduler)
    plan = planned(scheduler)
    assert plan.removed_request_ids == ["b"]
    assert shares(plan) == [("a", 7, 1, True)]


def test_nobody_is_admitted_in_a_step_that_ran_out_of_blocks() -> None:
    scheduler, kv = scheduler_of(num_blocks=4, policy="priority")
    scheduler.add(request_of("a", [1, 2, 3, 4, 5, 6, 7], max_tokens=4), 0.0)
    scheduler.add(request_of("b", [11, 12, 13, 14, 15, 16, 17, 18], max_tokens=4, priority=1), 0.0)
    step(scheduler)
    scheduler.add(request_of("c", [21]), 0.0)
    plan = planned(scheduler)  # "b" lacks a third block and preempts itself
    assert plan.removed_request_ids == ["b"]
    assert kv.num_available > 0, "there would be room"
    assert plan.new_requests == []
    assert [data.request_id for data in planned(scheduler).new_requests] == ["c"]


def test_the_watermark_stays_free_for_running_requests_but_not_for_an_empty_engine() -> None:
    scheduler, kv = scheduler_of(num_blocks=4, watermark_blocks=2)
    scheduler.add(request_of("a", [1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=4), 0.0)
    scheduler.add(request_of("b", [11]), 0.0)
    assert shares(planned(scheduler)) == [("a", 0, 9, True)]
    assert kv.num_available == 1
    scheduler.abort(["a"], FinishReason.ABORT, 0.0)
    assert shares(planned(scheduler)) == [("b", 0, 1, True)]


def test_a_request_that_does_not_fit_holds_its_place_until_blocks_are_freed() -> None:
    scheduler, _ = scheduler_of(num_blocks=4, max_num_batched_tokens=32)
    scheduler.add(request_of("a", list(range(10)), max_tokens=3), 0.0)
    scheduler.add(request_of("b", list(range(20, 28)), max_tokens=2), 0.0)
    scheduler.add(request_of("c", [31], max_tokens=2), 0.0)
    assert [share[0] for share in shares(planned(scheduler))] == ["a"]
    assert [share[0] for share in shares(planned(scheduler))] == ["a"]
    scheduler.abort(["a"], FinishReason.ABORT, 0.0)
    assert [share[0] for share in shares(planned(scheduler))] == ["b", "c"]


def test_a_request_that_did_not_fit_is_admitted_as_soon_as_another_ends() -> None:
    scheduler, _ = scheduler_of(num_blocks=4, max_num_batched_tokens=32)
    scheduler.add(request_of("a", [1], max_tokens=2), 0.0)
    scheduler.add(request_of("b", list(range(10, 18)), max_tokens=1), 0.0)
    scheduler.add(request_of("c", list(range(20, 28)), max_tokens=1), 0.0)
    plan = planned(scheduler)
    assert [share[0] for share in shares(plan)] == ["a", "b"]
    following = planned(scheduler)
    assert [share[0] for share in shares(following)] == ["a"], "it was tried and did not fit"
    scheduler.update(plan, result_of(plan), 0.0)
    assert [share[0] for share in shares(planned(scheduler))] == ["c"]


def test_what_a_preempted_request_computed_of_its_output_is_hit_when_it_returns() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1, 2, 3, 4, 5], max_tokens=20), 0.0)
    for _ in range(9):
        step(scheduler)
    scheduler._preempt(scheduler._requests["a"])
    # Of 14 tokens, 13 were computed, in three whole blocks of four.
    assert shares(planned(scheduler)) == [("a", 12, 2, True)]


def test_after_max_preemptions_a_request_gets_all_its_blocks_and_is_never_preempted_again() -> None:
    scheduler, kv = scheduler_of(num_blocks=6, max_preemptions=1)
    scheduler.add(request_of("a", [1, 2, 3, 4, 5, 6, 7], max_tokens=10), 0.0)
    scheduler.add(request_of("b", [11, 12, 13, 14, 15, 16, 17], max_tokens=6), 0.0)
    scheduler.add(request_of("c", [21, 22, 23, 24, 25, 26, 27], max_tokens=10), 0.0)
    preempted: list[str] = []
    finished: list[str] = []
    for _ in range(80):
        plan = scheduler.schedule(0.0)
        scheduler.check()
        if plan is None:
            break
        preempted += [request_id for request_id in plan.removed_request_ids if request_id not in finished]
        for output in scheduler.update(plan, result_of(plan), 0.0):
            if output.finish_reason is not None:
                finished.append(output.request_id)
                assert output.num_output_tokens == (6 if output.request_id == "b" else 10)
    assert sorted(finished) == ["a", "b", "c"]
    assert len(set(preempted)) == len(preempted) > 0, "each at most once"
    assert kv.num_available == 6


def test_a_second_protected_request_lets_others_pass_while_the_first_may_need_everything() -> None:
    scheduler, kv = scheduler_of(num_blocks=12, max_preemptions=1, max_num_batched_tokens=64)
    for name, first, max_tokens in [("a", 10, 45), ("b", 20, 40), ("c", 30, 4)]:
        scheduler.add(request_of(name, list(range(first, first + 4)), max_tokens=max_tokens), 0.0)
    step(scheduler)
    for name in "abc":
        scheduler._preempt(scheduler._requests[name])
    scheduler.add(request_of("d", [40], max_tokens=2), 0.0)
    plan = planned(scheduler)
    # "a" is the guaranteed one. "b" may need 11 blocks, which are not left; "c" gets all it can need.
    assert [(share.request_id, len(share.new_block_ids)) for share in plan.scheduled] == [("a", 2), ("c", 2), ("d", 1)]
    assert [data.token_ids[4:] for data in plan.new_requests] == [[TOKEN], [TOKEN], []]
    ended: list[str] = []
    for _ in range(100):
        ended += [o.request_id for o in scheduler.update(plan, result_of(plan), 0.0) if o.finish_reason is not None]
        if not scheduler.has_work():
            break
        plan = planned(scheduler)
        assert plan.removed_request_ids in ([], ended[-1:])
    assert ended == ["d", "c", "a", "b"]
    assert scheduler.stats().num_preemptions == 3, "protected requests are not preempted"
    assert kv.num_available == 12


def test_prompt_logprobs_survive_a_preemption() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1, 2, 3], sampling=SamplingParams(prompt_logprobs=0)), 0.0)
    request = scheduler._requests["a"]
    planned(scheduler)
    scheduler._preempt(request)
    scheduler.check()
    assert request.matchable_bytes == b"", "they must be computed again"
