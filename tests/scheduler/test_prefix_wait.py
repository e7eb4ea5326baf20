"""A burst with one prefix computes it once."""

from scheduling import planned, request_of, result_of, scheduler_of, shares, step

from penstock.messages import ErrorInfo, FinishReason, SamplingParams, StepResult
from penstock.scheduler.prefix_wait import MIN_SAVED_TOKENS

PREFIX = [5] * 80
ROOMY = {"max_model_len": 200, "max_num_batched_tokens": 200, "max_num_queued_tokens": 2000}


def test_a_burst_with_one_prefix_computes_it_once() -> None:
    scheduler, _ = scheduler_of(100, **ROOMY)
    for name in "abc":
        scheduler.add(request_of(name, [*PREFIX, ord(name)]), 0.0)
    first = planned(scheduler)
    assert shares(first) == [("a", 0, 81, True)]
    assert scheduler.stats().num_waiting == 2
    second = planned(scheduler)
    assert shares(second) == [("a", 81, 1, True)], "the prefix can be hit once its step has finished"
    scheduler.update(first, result_of(first), 0.0)
    assert shares(planned(scheduler)) == [("a", 82, 1, True), ("b", 80, 1, True), ("c", 80, 1, True)]
    assert scheduler.stats().num_waiting == 0


def test_a_follower_waits_only_for_what_it_shares() -> None:
    scheduler, _ = scheduler_of(100, **{**ROOMY, "max_num_batched_tokens": 50})
    scheduler.add(request_of("a", [*PREFIX, *range(100)]), 0.0)
    scheduler.add(request_of("b", [*PREFIX, 1]), 0.0)
    for first in (0, 50):
        plan = planned(scheduler)
        assert shares(plan) == [("a", first, 50, False)]
        scheduler.update(plan, result_of(plan), 0.0)
    # "b" is behind its leader, which takes the whole budget, but it waits in the queue like everybody now.
    assert scheduler._waiting.num_parked == 0
    assert shares(planned(scheduler)) == [("a", 100, 50, False)]
    assert shares(planned(scheduler)) == [("a", 150, 30, True), ("b", 80, 1, True)]


def test_followers_return_when_their_leader_goes() -> None:
    for how in ("abort", "error", "preempt", "expire"):
        scheduler, _ = scheduler_of(100, **ROOMY)
        scheduler.add(request_of("a", [*PREFIX, 1], deadline_s=9.0), 0.0)
        scheduler.add(request_of("b", [*PREFIX, 2]), 0.0)
        scheduler.add(request_of("c", [*PREFIX, 3]), 0.0)
        plan = planned(scheduler)
        assert [share[0] for share in shares(plan)] == ["a"]
        if how == "abort":
            scheduler.abort(["a"], FinishReason.ABORT, 0.0)
        elif how == "error":
            scheduler.update(plan, StepResult(1, {}, {}, {"a": ErrorInfo("x", 500, "y")}, 0.0), 0.0)
        elif how == "preempt":
            scheduler._preempt(scheduler._requests["a"])
            scheduler.update(plan, result_of(plan), 0.0)
        following = planned(scheduler, 10.0 if how == "expire" else 0.0)
        # Of a preempted leader's work nothing is left: its only step was in flight.
        assert [share[0] for share in shares(following)] == (["a"] if how == "preempt" else ["b"])


def test_a_follower_can_be_aborted_and_can_expire() -> None:
    scheduler, _ = scheduler_of(100, **ROOMY)
    scheduler.add(request_of("a", [*PREFIX, 1]), 0.0)
    scheduler.add(request_of("b", [*PREFIX, 2]), 0.0)
    scheduler.add(request_of("c", [*PREFIX, 3], deadline_s=5.0), 0.0)
    plan = planned(scheduler)
    assert [output.request_id for output in scheduler.abort(["b"], FinishReason.ABORT, 0.0)] == ["b"]
    scheduler.check()
    planned(scheduler, 6.0)
    assert [output.request_id for output in scheduler.take_finished()] == ["c"]
    assert [output.request_id for output in scheduler.update(plan, result_of(plan), 6.0)] == ["a"]
    assert shares(planned(scheduler)) == [("a", 82, 1, True)]


def test_nobody_waits_for_little_or_for_what_it_cannot_use() -> None:
    short = [5] * MIN_SAVED_TOKENS
    cases = [
        (short, {}, {}),  # its last token is always computed, so one block less is shared
        (PREFIX, {"namespace": "other"}, {}),
        (PREFIX, {"sampling": SamplingParams(prompt_logprobs=0)}, {}),
        (PREFIX, {}, {"caching": False}),
    ]
    for prefix, changes, settings in cases:
        scheduler, _ = scheduler_of(100, **ROOMY, **settings)
        scheduler.add(request_of("a", prefix), 0.0)
        scheduler.add(request_of("b", prefix, **changes), 0.0)
        assert [share[0] for share in shares(planned(scheduler))] == ["a", "b"]


def test_the_leader_that_shares_most_is_waited_for() -> None:
    scheduler, _ = scheduler_of(100, **ROOMY)
    head = [5] * 8
    scheduler.add(request_of("a", head + [1] * 80), 0.0)
    scheduler.add(request_of("b", head + [2] * 80), 0.0)
    scheduler.add(request_of("c", head + [2] * 80 + [3]), 0.0)
    assert [share[0] for share in shares(planned(scheduler))] == ["a", "b"]
    assert [request.request_id for request in scheduler._requests["b"].followers or ()] == ["c"]


def test_others_pass_those_who_wait_for_a_prefix() -> None:
    scheduler, _ = scheduler_of(100, **ROOMY)
    scheduler.add(request_of("a", [*PREFIX, 1]), 0.0)
    scheduler.add(request_of("b", [*PREFIX, 2]), 0.0)
    scheduler.add(request_of("c", [9, 9]), 0.0)
    assert [share[0] for share in shares(planned(scheduler))] == ["a", "c"]


def test_a_chain_of_prefixes_is_followed_link_by_link() -> None:
    scheduler, _ = scheduler_of(200, **ROOMY)
    scheduler.add(request_of("a", [*PREFIX, 1]), 0.0)
    scheduler.add(request_of("b", PREFIX + [6] * 80 + [1]), 0.0)
    scheduler.add(request_of("c", PREFIX + [6] * 80 + [2]), 0.0)
    assert [output.request_id for output in step(scheduler)] == ["a"]
    plan = planned(scheduler)
    assert shares(plan) == [("a", 81, 1, True), ("b", 80, 81, True)]
    scheduler.update(plan, result_of(plan), 0.0)
    assert shares(planned(scheduler))[-1] == ("c", 160, 1, True)
