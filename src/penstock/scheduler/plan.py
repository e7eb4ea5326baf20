"""A step while it is being planned, and while it is in flight."""

from __future__ import annotations

from penstock.messages import NewRequestData, ScheduledRequest
from penstock.scheduler.request import Request


class StepPlan:
    """budget: tokens still to give. requests[i] is the one that scheduled[i] names.

    num_decodes: leading entries of `scheduled` that continue a request by one token. is_short: blocks ran out, so
    nobody is admitted.
    """

    __slots__ = ("budget", "is_short", "new_requests", "num_decodes", "num_tokens", "requests", "scheduled")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.is_short = False
        self.num_decodes = 0
        self.num_tokens = 0
        self.scheduled: list[ScheduledRequest] = []
        self.requests: list[Request] = []
        self.new_requests: list[NewRequestData] = []

    def add(self, request: Request, num_tokens: int) -> None:
        """Gives a request the next `num_tokens` of its positions, and the runner the blocks it has not heard of."""
        first = request.num_computed_tokens
        request.num_computed_tokens = first + num_tokens
        samples = request.num_computed_tokens == len(request.token_ids) + request.num_pending
        if samples:
            request.num_pending += 1
        request.num_in_flight += 1
        self.budget -= num_tokens
        self.num_tokens += num_tokens
        self.requests.append(request)
        block_ids, request.new_block_ids = request.new_block_ids, []
        self.scheduled.append(ScheduledRequest(request.request_id, first, num_tokens, block_ids, samples))

    def add_new(self, request: Request, num_tokens: int) -> None:
        """The first share of a request that the runner does not know (any more)."""
        assert request.table is not None
        self.new_requests.append(
            NewRequestData(
                request.request_id,
                list(request.token_ids),
                request.num_prompt_tokens,
                request.sampling,
                request.stop_token_ids,
                request.pooling,
                request.sampler_state,
            )
        )
        request.new_block_ids = list(request.table.block_ids)
        self.add(request, num_tokens)
