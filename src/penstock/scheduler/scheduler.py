"""The scheduler: who runs in the next step, and how many tokens each.

Pipelining: schedule() may be called while earlier steps are in flight. A request whose next token is being drawn
is planned as if it had it (num_known_tokens); the runner feeds the token from its own row. What is predictable
(max_tokens) is never planned beyond; what is not (a stop token) makes update() discard the tokens of the steps
that were in flight.

Blocks: admission takes the blocks of all known tokens at once, and leaves `watermark_blocks` for running requests
to grow into. When one cannot grow, the running request of the worst rank is preempted: its blocks go (what it
computed stays cached while room lasts), and it returns to the queue at the place its arrival gives it.

Nobody waits forever:
- add() refuses a request that the pool could not hold alone, so one request can always finish by itself.
- After `max_preemptions` a request is protected: never preempted again, first in rank. One such runs with the
  blocks it needs now (the guaranteed one); others are admitted beside it only with all they can ever need.
- An unprotected request that cannot grow preempts an unprotected one, at worst itself. So whoever lacks a block and
  stays is the guaranteed one, with only protected requests beside it; those lack nothing, finish, and leave it
  alone with the pool, where it fits.
- Hence some running request always advances. Preemptions are at most max_preemptions a request, so work lost is
  finite; with nothing running the watermark is waived, and the first in the queue fits.

max_num_seqs is kept at most max_num_batched_tokens, so every running request gets at least a token a step, but those
of background work.
Background work gives way to everybody else: it is planned last, within what BackgroundPace leaves it, and whoever
waits for a row or for blocks takes those it has.
Prefixes that are being computed are waited for (PrefixWait), and so are those that the host tier has (StepPlan).
A one-pass request (pooling) is prefilled like any other, and ends with its vector instead of a token. An encoder's
texts are planned whole, and their tables have no blocks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from copy import copy
from operator import attrgetter
from typing import Final

from penstock.base.errors import QueueFullError, ValidationError
from penstock.config.engine import SchedulerConfig
from penstock.kvcache import BlockTable, KVCacheManager, KVCacheStats
from penstock.messages import (
    EngineRequest,
    EngineStats,
    ErrorInfo,
    FinishReason,
    RequestOutput,
    SchedulerOutput,
    StepResult,
)
from penstock.messages.bounds import BACKGROUND_PRIORITY
from penstock.scheduler.admission import check_acceptable, check_room
from penstock.scheduler.background_pace import BackgroundPace
from penstock.scheduler.deadlines import Deadlines
from penstock.scheduler.drain_rate import DrainRate
from penstock.scheduler.plan import StepPlan
from penstock.scheduler.prefill_pace import PrefillPace
from penstock.scheduler.prefix_wait import PrefixWait
from penstock.scheduler.request import NOT_ADMITTED, Request, RequestState
from penstock.scheduler.waiting_queue import WaitingQueue

_by_rank = attrgetter("rank")
_gives_way = attrgetter("gives_way")
_FINISHED: Final = RequestState.FINISHED  # compared once a row and step
_LOST_TOKEN: Final = ErrorInfo("internal_error", 500, "The engine gave nothing for this request.")


class Scheduler:
    """Plans steps under one token budget, and turns their results into outputs.

    There is no prefill phase and no decode phase: a request's num_computed_tokens catches up with its tokens. A step
    gives tokens to running requests that lack one (decodes), then to running ones that lack more (chunks of prefill),
    then admits waiting ones; so a long prompt never holds up a stream, and mixed steps are the normal case. Why nobody
    waits forever, and the rest of its rules: above.
    """

    def __init__(self, config: SchedulerConfig, kv_cache: KVCacheManager) -> None:
        self._config = config
        self._kv = kv_cache
        self._max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingQueue()
        self._running: list[Request] = []  # by rank, best first
        self._deadlines = Deadlines()
        self._in_flight: dict[int, StepPlan] = {}
        self._prefix_wait = PrefixWait(kv_cache.block_size, is_on=kv_cache.enable_prefix_caching)
        self._drain = DrainRate()
        self._pace = PrefillPace(config.target_step_s)
        self._background = BackgroundPace(is_on=self._pace.is_on and not config.is_encoder)
        self._num_others = 0  # requests that are no background work
        self._guaranteed: Request | None = None  # protected and running without all the blocks it may need
        self._blocked: tuple[Request, int] | None = None  # not admitted with that many blocks available
        self._removed_ids: list[str] = []
        self._finished: list[RequestOutput] = []
        self._num_arrivals = 0
        self._now = 0.0
        self._stats = EngineStats(num_blocks=kv_cache.num_blocks)

    def add(self, request: EngineRequest, now: float) -> None:
        """Takes a request into the queue, or says why not.

        Raises ContextOverflowError, ValidationError (malformed, or can never fit) and QueueFullError.
        """
        self._now = now
        if request.request_id in self._requests:
            raise ValidationError("A request with this id is in progress.", param="request_id")
        check_acceptable(request, self._config, self._kv)
        try:
            check_room(len(request.prompt_token_ids), self._config, self._waiting, self._drain)
        except QueueFullError:
            self._stats.num_rejected += 1
            raise
        is_protected = self._config.max_preemptions == 0
        has_priorities = self._config.policy == "priority"
        priority = request.priority if has_priorities else int(request.priority >= BACKGROUND_PRIORITY)
        rank = (not is_protected, priority, self._num_arrivals)
        try:
            accepted = Request(request, rank, is_protected, pools_every_token=self._config.pools_every_token)
        except (OverflowError, TypeError) as error:
            raise ValidationError("prompt_token_ids must be 32-bit integers.", param="prompt_token_ids") from error
        self._num_arrivals += 1
        self._requests[accepted.request_id] = accepted
        self._num_others += not accepted.is_background
        self._waiting.push(accepted)
        self._deadlines.add(accepted, len(self._requests))

    def abort(self, request_ids: Iterable[str], finish_reason: FinishReason, now: float) -> list[RequestOutput]:
        """Ends requests, wherever they are; their blocks are free at once. Unknown ids are ignored."""
        self._now = now
        found = [self._requests[request_id] for request_id in request_ids if request_id in self._requests]
        return [self._finish(request, finish_reason) for request in dict.fromkeys(found)]

    def fail_all(self, error: ErrorInfo) -> list[RequestOutput]:
        """Ends every request with an error; steps in flight are forgotten."""
        self._in_flight.clear()
        return self.take_finished() + [
            self._finish(request, FinishReason.ERROR, error) for request in list(self._requests.values())
        ]

    def schedule(self, now: float) -> SchedulerOutput | None:
        """The next step's plan, or None when nothing can be computed before a step in flight is updated.

        Expired requests end here; their final outputs come from the next update() or take_finished().
        """
        self._now = now
        if self._deadlines:
            self._finished += [self._finish(late, FinishReason.TIMEOUT) for late in self._deadlines.take_expired(now)]
        self._background.tick(now, self._num_others > 0)
        self._make_room()
        plan = StepPlan(self._stats.num_steps + 1, self._config.max_num_batched_tokens)
        self._fill(plan, is_background=False)
        plan.num_others_tokens = plan.num_tokens
        budget = plan.budget
        if self._num_others < len(self._requests):
            plan.budget = self._background.budget(plan, is_idle=not self._in_flight)
            self._fill(plan, is_background=True)
        if not plan.scheduled:
            plan.budget = budget
            plan.start_restored()
        self._drain.tick(now, self._waiting.num_requests > 0)
        if not plan.scheduled:
            return None
        self._stats.num_steps = plan.step_id
        self._in_flight[plan.step_id] = plan
        removed_ids, self._removed_ids = self._removed_ids, []
        output = plan.output(removed_ids, self._kv)
        for request, table in plan.restoring:
            self._offer_blocks(request, table)  # what came back is in the tree: followers may go on
        return output

    def update(self, output: SchedulerOutput, result: StepResult, now: float) -> list[RequestOutput]:
        """Applies a step's result; the outputs it gave, and those of requests that expired since the last call."""
        self._now = now
        outputs = self.take_finished()
        plan = self._in_flight.pop(output.step_id, None)
        self._stats.last_step_s = result.seconds
        if plan is None:
            return outputs  # fail_all() came first
        if self._pace.is_on:
            self._pace.observe(plan.num_tokens - plan.num_decodes, result.seconds)
        if self._background.is_on:
            self._background.observe(plan, result.seconds)
        return outputs + self._apply(plan, result)

    def take_finished(self) -> list[RequestOutput]:
        """Final outputs of requests that expired in schedule(), once."""
        finished, self._finished = self._finished, []
        return finished

    def has_work(self) -> bool:
        """Whether any request, step in flight or output is left."""
        return bool(self._requests or self._in_flight or self._finished)

    def stats(self) -> EngineStats:
        """A snapshot, without step_started_s, which only the engine knows."""
        stats = copy(self._stats)
        stats.num_running = len(self._running)
        stats.num_waiting = self._waiting.num_requests
        _fill_in(stats, self._kv.stats())
        stats.drain_tokens_per_s = self._drain.tokens_per_s
        return stats

    # Planning

    def _make_room(self) -> None:
        """Whoever waits for a row or for blocks takes those of background work. That does not count as a preemption of
        it: protected from the next, it would come before everybody."""
        first = self._waiting.peek()
        if first is None or first.gives_way or not self._running or not self._running[-1].gives_way:
            return
        if len(self._running) == self._max_running or self._is_still_blocked(first):
            self._put_back(self._running[-1])

    def _fill(self, plan: StepPlan, *, is_background: bool) -> None:
        """Gives shares to everybody's requests but those of background work, or to these."""
        prefills = self._plan_decodes(plan, is_background)
        if self._pace.is_on and plan.num_decodes:
            plan.budget = min(plan.budget, self._pace.limit)
        if self._background.is_on and is_background:
            plan.budget = min(plan.budget, self._background.prefill_limit)
        for request in prefills:
            if plan.budget > 0:
                plan.add_rest(request)
        if self._waiting.num_requests and not plan.is_short:
            self._admit(plan, is_background)

    def _plan_decodes(self, plan: StepPlan, is_background: bool) -> list[Request]:
        """Gives each running request of a kind that lacks one token that token; returns those that lack more.

        Those who lack blocks preempt from the end of the list, so nobody is preempted who is in the plan. Streams
        that lack forced tokens come before prompts.
        """
        prefills: list[Request] = []
        streams: list[Request] = []
        decodes: list[Request] = []
        running, split, budget = self._running, len(self._running), plan.budget
        if self._num_others < len(self._requests):
            split = bisect_left(running, True, key=_gives_way)
        for request in running[split:] if is_background else running[:split]:
            if len(decodes) >= budget:
                break
            num_computed = request.num_computed_tokens
            num_known = request.num_known_tokens
            if num_known - num_computed > 1:
                if num_known <= request.num_slots or self._grow(request, num_known, plan):
                    (prefills if num_computed < request.num_prompt_tokens else streams).append(request)
            elif num_known >= request.max_total_tokens:
                pass  # its last token is being drawn
            elif num_computed < request.num_slots or self._grow(request, num_computed + 1, plan):
                decodes.append(request)
        plan.add_decodes(decodes)
        return streams + prefills

    def _grow(self, request: Request, num_tokens: int, plan: StepPlan) -> bool:
        """Blocks for so many tokens of a request; False: it was preempted (by now), or waits for protected ones."""
        while request.table is not None:
            new_block_ids = self._kv.grow(request.table, num_tokens)
            if new_block_ids is not None:
                request.num_slots = len(request.table.block_ids) * self._kv.block_size
                request.new_block_ids = request.new_block_ids + new_block_ids  # a share may hold the list that was
                return True
            plan.is_short = True
            victim = self._running[-1]
            if victim.is_protected:
                assert request is self._guaranteed
                return False
            self._preempt(victim)
        return False

    def _admit(self, plan: StepPlan, is_background: bool) -> None:
        """Starts waiting requests of a kind, best first, while budget, rows and blocks last."""
        passed: list[Request] = []
        while plan.budget > 0 and len(self._running) < self._max_running:
            request = self._waiting.peek()
            if request is None or request.gives_way != is_background or request.last_step_id in self._in_flight:
                break  # in flight: a preempted one whose last tokens are still to come
            request.unpack()
            if self._config.is_encoder and len(request.token_ids) > plan.budget:
                break  # it runs whole, in a step of its own if need be
            num_tokens = self._tokens_to_reserve(request)
            if num_tokens is None:
                if len(passed) == self._max_running:
                    break
                passed.append(self._waiting.pop())
                continue
            if self._is_still_blocked(request):
                break
            match = self._kv.match_prefix(request.matchable_bytes, request.namespace)
            leader = self._prefix_wait.leader_for(request, match)
            if leader is not None:
                self._kv.release(match)
                if self._waiting.num_parked >= self._max_running:
                    break
                self._prefix_wait.follow(self._waiting.park(), leader)
                continue
            num_spare = self._config.watermark_blocks if self._running and not request.is_protected else 0
            table = self._kv.allocate(match, num_tokens, num_spare)
            if table is None:
                self._blocked = (request, self._kv.num_available)
                break
            self._start(self._waiting.pop(), table, num_tokens, plan)
        for request in passed:
            self._waiting.push(request)

    def _is_still_blocked(self, request: Request) -> bool:
        """Whether nothing has been freed since this request did not fit; saves matching its prompt again every step."""
        if self._blocked is None or not self._running:
            return False
        blocked, num_available = self._blocked
        return blocked is request and self._kv.num_available <= num_available

    def _tokens_to_reserve(self, request: Request) -> int | None:
        """How many tokens' blocks a request is admitted with; None if it must let others pass for now."""
        if self._config.is_encoder:
            return 0
        num_known = len(request.token_ids)
        if not request.is_protected or self._guaranteed is None:
            return num_known
        num_worst = request.max_total_tokens - 1  # the last token is drawn, but never computed
        return num_worst if self._kv.blocks_for(num_worst) <= self._kv.num_available else None

    def _start(self, request: Request, table: BlockTable, num_reserved: int, plan: StepPlan) -> None:
        num_cacheable = 0 if self._config.is_encoder else request.max_total_tokens - 1
        if request.is_protected and num_reserved < num_cacheable:
            self._guaranteed = request
        request.state = RequestState.RUNNING
        request.table = table
        request.new_block_ids = list(table.block_ids)
        request.num_slots = len(table.block_ids) * self._kv.block_size or len(request.token_ids)
        request.num_computed_tokens = request.num_finished_tokens = table.num_cached_tokens
        insort(self._running, request, key=_by_rank)
        if request.num_cached_tokens == NOT_ADMITTED:
            request.num_cached_tokens = table.num_cached_tokens
            request.scheduled_s = self._now
            self._stats.num_prompt_tokens += request.num_prompt_tokens
            self._stats.num_cached_prompt_tokens += table.num_cached_tokens
            self._stats.num_host_hit_tokens += table.num_host_tokens
            self._drain.admitted(request.num_prompt_tokens)
        self._prefix_wait.lead(request)
        plan.start(request, table)

    def _preempt(self, request: Request) -> None:
        """Takes a running request's blocks and puts it back into the queue."""
        assert not request.is_protected
        request.num_preemptions += 1
        if request.num_preemptions >= self._config.max_preemptions:
            request.is_protected = True
        self._put_back(request)

    def _put_back(self, request: Request) -> None:
        self._leave_running(request)
        request.state = RequestState.PREEMPTED
        request.num_computed_tokens = request.num_finished_tokens = 0
        self._stats.num_preemptions += 1
        request.rank = (not request.is_protected, *request.rank[1:])
        self._waiting.push(request)

    # Results

    def _apply(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """The outputs that a step gave. One loop with hardly a call in it: this is most of what a row costs."""
        outputs: list[RequestOutput] = []
        errors, sampled, num_taken = result.errors, result.sampled, 0
        # By object, not by id: an id may have ended and been used again while the step was in flight.
        for request, share in zip(plan.requests, plan.scheduled, strict=True):
            if request.state is _FINISHED:
                continue
            if errors and (error := errors.get(request.request_id)) is not None:
                outputs.append(self._finish(request, FinishReason.ERROR, error))
                continue
            table = request.table
            if table is not None:  # else it was preempted while the step was in flight; its tokens still count
                request.num_finished_tokens = end = share.num_computed_tokens + share.num_tokens
                if end >= table.insert_at:
                    self._offer_blocks(request, table)
            if request.prompt_logprobs is not None and request.request_id in result.prompt_logprobs:
                request.collect_prompt_logprobs(share.num_computed_tokens, result.prompt_logprobs[request.request_id])
            if not share.samples or request.num_void:
                request.num_void -= share.samples
                continue
            drawn = sampled.get(request.request_id)
            if drawn is None or not drawn.token_ids:
                outputs.append(self._end_without_token(request, result))
                continue
            output = request.take(drawn, self._now)
            num_taken += len(output.token_ids)
            outputs.append(output)
            if output.stop_token_id is not None or len(request.token_ids) >= request.max_total_tokens:
                is_stop = output.stop_token_id is not None or drawn.is_complete
                self._end(request, output, FinishReason.STOP if is_stop else FinishReason.LENGTH)
        self._stats.num_output_tokens += num_taken
        return outputs

    def _end_without_token(self, request: Request, result: StepResult) -> RequestOutput:
        """A one-pass request has its vector; of any other a token was due."""
        if result.pooled and request.request_id in result.pooled:
            return self._end(request, request.vector_output(result, self._now), FinishReason.STOP)
        return self._finish(request, FinishReason.ERROR, _LOST_TOKEN)

    def _offer_blocks(self, request: Request, table: BlockTable) -> None:
        self._kv.insert(table, request.token_ids, request.num_finished_tokens)
        self._prefix_wait.lead(request)
        if request.followers is not None:
            self._unpark(self._prefix_wait.take_ready(request))

    # Ends

    def _finish(self, request: Request, reason: FinishReason, error: ErrorInfo | None = None) -> RequestOutput:
        """Ends a request wherever it is, with an output that brings no token."""
        return self._end(request, RequestOutput(request.request_id), reason, error)

    def _end(
        self, request: Request, output: RequestOutput, reason: FinishReason, error: ErrorInfo | None = None
    ) -> RequestOutput:
        is_waiting = request.state is not RequestState.RUNNING
        if not is_waiting:
            self._leave_running(request)
        request.state = RequestState.FINISHED
        if is_waiting:
            self._waiting.discard(request)
        del self._requests[request.request_id]
        self._num_others -= not request.is_background
        return request.close(output, reason, self._now, error)

    def _leave_running(self, request: Request) -> None:
        assert request.table is not None
        self._unpark(self._prefix_wait.leave(request))
        self._running.remove(request)
        if request.is_known:
            self._removed_ids.append(request.request_id)
            request.is_known = False
        self._kv.free(request.table, request.token_ids, request.num_finished_tokens, request.pins, self._now)
        request.table = None
        request.num_slots = 0
        request.new_block_ids = []
        if request is self._guaranteed:
            self._guaranteed = None

    def _unpark(self, followers: list[Request]) -> None:
        for request in followers:
            if request.state is not RequestState.FINISHED:
                self._waiting.unpark(request)

    def check(self) -> None:
        """Asserts the invariants of queue, requests and blocks."""
        self._kv.check()
        states: dict[RequestState, list[Request]] = {state: [] for state in RequestState}
        for request_id, request in self._requests.items():
            assert request.request_id == request_id
            states[request.state].append(request)
        assert not states[RequestState.FINISHED]
        self._waiting.check(states[RequestState.WAITING] + states[RequestState.PREEMPTED])
        assert self._num_others == sum(not request.is_background for request in self._requests.values())
        running = self._running
        assert sorted(states[RequestState.RUNNING], key=_by_rank) == running
        assert sorted(running, key=_gives_way) == running
        assert len(running) <= self._max_running
        self._prefix_wait.check(running)
        assert self._kv.num_tables == len(running)
        in_flight = [request for plan in self._in_flight.values() for request in plan.requests]
        for request in self._requests.values():
            assert (request.last_step_id in self._in_flight) == (request in in_flight)
            assert request.num_preemptions <= self._config.max_preemptions
            request.check(in_flight.count(request))
        assert self._guaranteed is None or self._guaranteed in running
        needy = [r for r in running if r.is_protected and r.num_slots < r.max_total_tokens - 1]
        assert needy in ([], [self._guaranteed])


def _fill_in(stats: EngineStats, kv: KVCacheStats) -> None:
    stats.num_free_blocks = kv.num_free_blocks
    stats.num_cached_blocks = kv.num_available_blocks - kv.num_free_blocks
    stats.num_host_blocks, stats.num_host_cached_blocks = kv.num_host_blocks, kv.num_host_cached_blocks
    stats.num_offloaded_blocks, stats.num_restored_blocks = kv.num_offloaded_blocks, kv.num_restored_blocks
