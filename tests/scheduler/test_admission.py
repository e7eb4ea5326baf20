"""What is refused and how, who goes first, deadlines, aborts."""

import pytest
from scheduling import planned, request_of, result_of, scheduler_of, shares, step

from penstock.base.errors import ContextOverflowError, QueueFullError, ValidationError
from penstock.messages import FinishReason, SamplingParams
from penstock.scheduler.drain_rate import DrainRate
from penstock.scheduler.request import Request, RequestState
from penstock.scheduler.waiting_queue import WaitingQueue


def test_a_request_beyond_the_context_is_refused_with_the_numbers() -> None:
    scheduler, _ = scheduler_of(max_model_len=10)
    with pytest.raises(ContextOverflowError, match=r"6 tokens and max_tokens is 5.* context of 10 tokens"):
        scheduler.add(request_of("a", [1] * 6, max_tokens=5), 0.0)
    scheduler.add(request_of("a", [1] * 6, max_tokens=4), 0.0)


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler, _ = scheduler_of(num_blocks=3)
    with pytest.raises(ValidationError, match=r"can need 4 blocks of 4 tokens \(prompt 8, max_tokens 6\).* has 3"):
        scheduler.add(request_of("a", [1] * 8, max_tokens=6), 0.0)
    scheduler.add(request_of("a", [1] * 8, max_tokens=5), 0.0)  # the 13th token is drawn, but never computed
    for _ in range(5):
        step(scheduler)
    assert not scheduler.has_work()


def test_malformed_requests_are_refused() -> None:
    scheduler, _ = scheduler_of()
    with pytest.raises(ValidationError, match="empty"):
        scheduler.add(request_of("a", []), 0.0)
    with pytest.raises(ValidationError, match="max_tokens must be at least 1"):
        scheduler.add(request_of("a", [1], max_tokens=0), 0.0)
    with pytest.raises(ValidationError, match="32-bit"):
        scheduler.add(request_of("a", [1 << 40]), 0.0)
    with pytest.raises(ValidationError, match="32-bit"):
        scheduler.add(request_of("a", ["1"]), 0.0)  # type: ignore[list-item]
    scheduler.add(request_of("a", [1]), 0.0)
    with pytest.raises(ValidationError, match="in progress"):
        scheduler.add(request_of("a", [1]), 0.0)
    scheduler.check()


def test_the_queue_is_bounded_in_requests() -> None:
    scheduler, _ = scheduler_of(max_num_queued_requests=2)
    scheduler.add(request_of("a", [1]), 0.0)
    scheduler.add(request_of("b", [2]), 0.0)
    with pytest.raises(QueueFullError, match="2 requests") as caught:
        scheduler.add(request_of("c", [3]), 0.0)
    assert caught.value.retry_after_s == 1.0, "nothing has been measured yet"
    assert scheduler.stats().num_rejected == 1
    step(scheduler)
    scheduler.add(request_of("c", [3]), 0.0)


def test_the_queue_is_bounded_in_tokens_but_takes_any_prompt_when_empty() -> None:
    scheduler, _ = scheduler_of(max_num_queued_tokens=10)
    scheduler.add(request_of("a", [1] * 12), 0.0)
    with pytest.raises(QueueFullError, match="12 prompt tokens"):
        scheduler.add(request_of("b", [1]), 0.0)


def test_retry_after_follows_the_measured_drain_rate() -> None:
    scheduler, _ = scheduler_of(max_num_seqs=1, max_num_queued_requests=5)
    now = 0.0
    for number in range(44):
        scheduler.add(request_of(f"r{number}", [number], max_tokens=1), now)
        if number < 4:
            continue
        step(scheduler, now)
        now += 2.5  # one request every 2.5 seconds
    scheduler.add(request_of("last", [1], max_tokens=1), now)
    with pytest.raises(QueueFullError) as caught:
        scheduler.add(request_of("excess", [1], max_tokens=1), now)
    assert caught.value.retry_after_s == pytest.approx(2.5)
    assert scheduler.stats().drain_tokens_per_s == pytest.approx(0.4)


def test_the_drain_rate_does_not_count_time_in_which_nobody_waits() -> None:
    drain = DrainRate()
    drain.tick(0.0, is_busy=True)
    for _ in range(10):
        drain.admitted(5)
    drain.tick(2.0, is_busy=False)
    assert (drain.requests_per_s, drain.tokens_per_s) == (5.0, 25.0)
    drain.admitted(5)  # came and went with an empty queue
    drain.tick(1000.0, is_busy=True)
    assert drain.requests_per_s == 5.0
    for _ in range(5):
        drain.admitted(5)
    drain.tick(1001.0, is_busy=True)
    assert drain.requests_per_s == 5.0
    assert drain.retry_after_s(20, 0) == 4.0
    assert drain.retry_after_s(0, 250) == 10.0
    assert drain.retry_after_s(1, 1) == 1.0
    assert drain.retry_after_s(10_000, 0) == 60.0


def test_fcfs_ignores_priority_and_the_priority_policy_keeps_arrival_within_one() -> None:
    for policy, order in [("fcfs", "abcd"), ("priority", "bdac")]:
        scheduler, _ = scheduler_of(policy=policy, max_num_seqs=1)
        for name, priority in [("a", 1), ("b", -1), ("c", 1), ("d", -1)]:
            scheduler.add(request_of(name, [ord(name)], max_tokens=1, priority=priority), 0.0)
        assert [step(scheduler)[0].request_id for _ in range(4)] == list(order)


def test_an_expired_request_that_waits_is_never_prefilled() -> None:
    scheduler, _ = scheduler_of(max_num_seqs=1)
    scheduler.add(request_of("a", [1], max_tokens=2), 0.0)
    scheduler.add(request_of("b", [2], deadline_s=5.0), 0.0)
    step(scheduler, 1.0)
    plan = planned(scheduler, 5.0)
    assert shares(plan) == [("a", 1, 1, True)]
    outputs = scheduler.update(plan, result_of(plan), 5.5)
    assert [(output.request_id, output.finish_reason) for output in outputs] == [
        ("b", FinishReason.TIMEOUT),
        ("a", FinishReason.LENGTH),
    ]
    assert outputs[0].timings is not None
    assert outputs[0].timings.scheduled_s == 0.0
    assert not scheduler.has_work()


def test_an_expired_request_that_runs_ends_and_frees_its_blocks() -> None:
    scheduler, kv = scheduler_of()
    scheduler.add(request_of("a", [1], deadline_s=5.0), 0.0)
    step(scheduler, 1.0)
    in_flight = planned(scheduler, 2.0)
    assert scheduler.schedule(6.0) is None
    assert kv.num_free == kv.num_blocks
    assert scheduler.has_work()
    (last,) = scheduler.take_finished()
    assert (last.finish_reason, last.num_output_tokens) == (FinishReason.TIMEOUT, 1)
    assert scheduler.take_finished() == []
    assert scheduler.update(in_flight, result_of(in_flight), 6.0) == []
    assert not scheduler.has_work()


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.STOP])
@pytest.mark.parametrize("phase", ["waiting", "prefilling", "decoding", "in flight"])
def test_abort_ends_a_request_in_any_phase_and_frees_its_blocks_at_once(phase: str, reason: FinishReason) -> None:
    scheduler, kv = scheduler_of(max_num_batched_tokens=4, max_num_seqs=1)
    if phase == "waiting":
        scheduler.add(request_of("other", [1]), 0.0)
        step(scheduler)
    scheduler.add(request_of("a", [1, 2, 3, 4, 5, 6]), 0.0)
    in_flight = []
    if phase == "prefilling":
        step(scheduler)
    elif phase == "decoding":
        step(scheduler)
        step(scheduler)
    elif phase == "in flight":
        in_flight = [planned(scheduler), planned(scheduler)]
    used = kv.num_blocks - kv.num_available
    (last,) = scheduler.abort(["a", "unknown", "a"], reason, 7.0)
    scheduler.check()
    assert (last.request_id, last.finish_reason, last.token_ids) == ("a", reason, [])
    assert last.num_output_tokens == (1 if phase == "decoding" else 0)
    assert used == (1 if phase == "waiting" else 2)
    assert kv.num_blocks - kv.num_available == (1 if phase == "waiting" else 0)
    assert scheduler.abort(["a"], reason, 7.0) == []
    for plan in in_flight:
        assert scheduler.update(plan, result_of(plan), 8.0) == []


def test_what_an_aborted_request_computed_stays_cached() -> None:
    scheduler, _ = scheduler_of(max_num_batched_tokens=8)
    scheduler.add(request_of("a", list(range(12))), 0.0)
    step(scheduler)
    planned(scheduler)  # in flight, so not to be trusted yet
    scheduler.abort(["a"], FinishReason.ABORT, 0.0)
    scheduler.add(request_of("b", list(range(12)), max_tokens=1), 0.0)
    plan = planned(scheduler)
    assert shares(plan) == [("b", 8, 4, True)]
    assert scheduler.update(plan, result_of(plan), 0.0)[0].num_cached_tokens == 8


def test_a_hit_inside_a_block_is_copied_before_the_step() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1), 0.0)
    step(scheduler)
    scheduler.add(request_of("b", [1, 2, 3, 4, 5, 6, 0, 0, 0]), 0.0)
    plan = planned(scheduler)
    assert shares(plan) == [("b", 6, 3, True)]
    assert plan.scheduled[0].new_block_ids == [0, 2, 3]
    assert [(copy.source, copy.destination) for copy in plan.block_copies] == [(1, 2)]
    assert plan.num_tokens == 3


def test_namespaces_do_not_share_prefixes() -> None:
    scheduler, _ = scheduler_of()
    scheduler.add(request_of("a", [1, 2, 3, 4, 5], max_tokens=1, namespace="x"), 0.0)
    step(scheduler)
    scheduler.add(request_of("b", [1, 2, 3, 4, 5], namespace="y"), 0.0)
    assert shares(planned(scheduler)) == [("b", 0, 5, True)]


def test_requests_that_ended_in_the_queue_do_not_pile_up_in_it() -> None:
    queue = WaitingQueue()
    requests = [Request(request_of(str(i), [1, 2]), (1, 0, i)) for i in range(1000)]
    for request in requests:
        queue.push(request)
    for request in requests[1:]:
        request.state = RequestState.FINISHED
        queue.discard(request)
    assert len(queue._heap) < 130
    queue.check(requests[:1])
    assert queue.peek() is requests[0]
    assert (queue.num_requests, queue.num_tokens) == (1, 2)


def test_deadlines_of_requests_that_ended_do_not_pile_up() -> None:
    scheduler, _ = scheduler_of()
    for number in range(1000):
        scheduler.add(request_of(str(number), [1], deadline_s=1000.0, sampling=SamplingParams()), 0.0)
        scheduler.abort([str(number)], FinishReason.ABORT, 0.0)
    assert len(scheduler._deadlines) < 130
