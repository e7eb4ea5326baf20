"""A step while it is being planned, and while it is in flight."""

from __future__ import annotations

from penstock.kvcache import BlockTable, KVCacheManager
from penstock.messages import NewRequestData, ScheduledRequest, SchedulerOutput
from penstock.scheduler.request import Request


class StepPlan:
    """step_id: what it will be called. budget: tokens still to give. requests[i] is the one that scheduled[i] names.

    num_decodes: entries of `scheduled` that continue a request by one token. num_others_tokens: of num_tokens, those
    that are no background work. is_short: blocks ran out, so nobody is admitted. restoring: requests whose blocks are
    on their way from the host tier; awaits_restores: some of these are scheduled.
    """

    __slots__ = (
        "awaits_restores", "budget", "is_short", "new_requests", "num_decodes", "num_others_tokens", "num_tokens",
        "requests", "restoring", "scheduled", "step_id",
    )  # fmt: skip

    def __init__(self, step_id: int, budget: int) -> None:
        self.step_id = step_id
        self.budget = budget
        self.is_short = False
        self.num_decodes = 0
        self.num_others_tokens = 0
        self.num_tokens = 0
        self.scheduled: list[ScheduledRequest] = []
        self.requests: list[Request] = []
        self.new_requests: list[NewRequestData] = []
        self.restoring: list[tuple[Request, BlockTable]] = []
        self.awaits_restores = False

    def add(self, request: Request, num_tokens: int) -> None:
        """Gives a request the next `num_tokens` of its positions, and the runner what it has not heard of."""
        if not request.is_known:
            self._introduce(request)
        first = request.num_computed_tokens
        request.num_computed_tokens = first + num_tokens
        samples = request.num_computed_tokens == request.num_known_tokens
        if samples:
            request.num_known_tokens += 1
        request.last_step_id = self.step_id
        self.budget -= num_tokens
        self.num_tokens += num_tokens
        self.requests.append(request)
        block_ids, request.new_block_ids = request.new_block_ids, []
        self.scheduled.append(ScheduledRequest(request.request_id, first, num_tokens, block_ids, samples))

    def add_decodes(self, requests: list[Request]) -> None:
        """As add(request, 1) for each, whose last known token is all that it lacks."""
        scheduled, step_id = self.scheduled, self.step_id
        for request in requests:
            if not request.is_known:
                self._introduce(request)
            first = request.num_computed_tokens
            request.num_computed_tokens = first + 1
            request.num_known_tokens += 1
            request.last_step_id = step_id
            block_ids = request.new_block_ids
            if block_ids:
                request.new_block_ids = []
            scheduled.append(ScheduledRequest(request.request_id, first, 1, block_ids, True))
        self.requests += requests
        self.budget -= len(requests)
        self.num_tokens += len(requests)
        self.num_decodes += len(requests)

    def add_rest(self, request: Request) -> None:
        """Gives a request all that it lacks, as far as the budget goes."""
        self.add(request, min(len(request.token_ids) - request.num_computed_tokens, self.budget))

    def start(self, request: Request, table: BlockTable) -> None:
        """Gives an admitted request its first share: in the next step, if it needs copies from the host tier, so that
        these go on beside this one."""
        if table.num_host_tokens:
            self.restoring.append((request, table))
        else:
            self.add_rest(request)

    def start_restored(self) -> None:
        """With nothing else to compute, this step itself waits for the host tier's copies."""
        for request, _ in self.restoring:
            if self.budget > 0:
                self.add_rest(request)
                self.awaits_restores = True

    def output(self, removed_ids: list[str], kv: KVCacheManager) -> SchedulerOutput:
        """The plan as the runner takes it, with the copies that the cache has planned."""
        offloads, restores = kv.take_host_copies()
        return SchedulerOutput(
            step_id=self.step_id,
            scheduled=self.scheduled,
            new_requests=self.new_requests,
            removed_request_ids=removed_ids,
            block_copies=kv.take_copies(),
            num_tokens=self.num_tokens,
            offloads=offloads,
            restores=restores,
            awaits_restores=self.awaits_restores,
        )

    def _introduce(self, request: Request) -> None:
        """Describes a request that the runner does not know (any more)."""
        request.is_known = True
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
