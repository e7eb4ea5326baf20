"""A request inside the scheduler: what it has, where it stands."""

from __future__ import annotations

import enum
from typing import Final

from penstock.kvcache import TOKEN_BYTES, BlockTable, decode_tokens, encode_tokens
from penstock.messages import (
    EngineRequest,
    ErrorInfo,
    FinishReason,
    PoolingParams,
    RequestOutput,
    RequestTimings,
    SampledTokens,
    StepResult,
    TokenLogprobs,
)
from penstock.messages.bounds import BACKGROUND_PRIORITY

NOT_ADMITTED: Final = -1

# Protected requests come before all others, then lower priority values, then earlier arrivals. Never equal.
Rank = tuple[int, int, int]


class RequestState(enum.Enum):
    WAITING = enum.auto()  # in the queue, or parked behind a running request that computes the same prefix
    RUNNING = enum.auto()  # has blocks and a row in the runner
    PREEMPTED = enum.auto()  # back in the queue; its blocks are gone, its tokens are not
    FINISHED = enum.auto()  # its final output is made


class Request:
    """One sequence and its progress. Positions count from the first prompt token.

    token_bytes: the tokens known when it entered the queue, as the prefix tree compares them. token_ids: the prompt and
    the output so far, as a list; made by unpack() when its turn comes, because lists of waiting prompts would be most
    of what the garbage collector has to walk. A running request has, in this order,

        num_finished_tokens <= num_computed_tokens <= num_known_tokens

    positions that finished steps have written; positions given to any step; and tokens that exist or that steps in
    flight are assumed to draw. Where a grammar forces tokens a step gives several at once (jump-forward); they are
    computed like a prompt's. max_total_tokens bounds the last, so steps are never planned beyond it.
    """

    __slots__ = (
        "arrival_s",
        "deadline_s",
        "first_token_s",
        "followers",
        "has_output",
        "is_background",
        "is_known",
        "is_parked",
        "is_protected",
        "last_step_id",
        "leader_key",
        "max_total_tokens",
        "min_tokens",
        "namespace",
        "new_block_ids",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_finished_tokens",
        "num_known_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_slots",
        "num_void",
        "pins",
        "pooling",
        "pools_every_token",
        "prompt_logprobs",
        "rank",
        "request_id",
        "resume_blocks",
        "sampler_state",
        "sampling",
        "scheduled_s",
        "state",
        "stop_token_ids",
        "table",
        "token_bytes",
        "token_ids",
    )

    def __init__(
        self, message: EngineRequest, rank: Rank, is_protected: bool = False, *, pools_every_token: bool = False
    ) -> None:
        """pools_every_token: if it is a one-pass request, its vector needs every position.

        Raises OverflowError or TypeError if the prompt holds anything but 32-bit integers.
        """
        prompt = message.prompt_token_ids
        self.token_bytes = encode_tokens(prompt)
        self.request_id = message.request_id
        self.namespace = message.namespace
        self.sampling = message.sampling
        self.pooling: PoolingParams | None = message.pooling
        self.pools_every_token = pools_every_token and message.pooling is not None
        self.stop_token_ids = message.stop_token_ids
        self.min_tokens = message.sampling.min_tokens
        self.num_prompt_tokens = len(prompt)
        self.max_total_tokens = len(prompt) + message.max_tokens
        self.token_ids: list[int] = []
        self.deadline_s = message.deadline_s
        self.pins = message.pins
        self.rank = rank
        self.is_background = message.priority >= BACKGROUND_PRIORITY

        self.state = RequestState.WAITING
        self.is_protected = is_protected
        self.table: BlockTable | None = None
        self.is_known = False  # to the runner
        self.num_slots = 0  # positions that the table has room for; 0 without one
        self.new_block_ids: list[int] = []  # of the table, not told to the runner yet
        self.num_computed_tokens = 0
        self.num_finished_tokens = 0
        self.num_known_tokens = len(prompt)
        self.num_void = 0  # of the draws in flight, the oldest so many give nothing: their tokens were forced
        self.last_step_id = 0  # the last step that computes something for it
        self.num_cached_tokens = NOT_ADMITTED  # prefix hit at the first admission
        self.num_preemptions = 0
        self.sampler_state: float | None = None  # of the last draw; goes back to the runner after a preemption
        self.has_output = False
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if message.sampling.prompt_logprobs is not None else None

        self.arrival_s = message.arrival_s
        self.scheduled_s = 0.0
        self.first_token_s = 0.0

        # See prefix_wait.py.
        self.is_parked = False
        self.resume_blocks = 0
        self.leader_key: tuple[str, bytes] | None = None
        self.followers: list[Request] | None = None

    @property
    def gives_way(self) -> bool:
        """Whether it may be left out of a step, or lose its place, for somebody else."""
        return self.is_background and not self.is_protected

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens if self.token_ids else 0

    @property
    def matchable_bytes(self) -> bytes:
        """What may be looked for in the cache: nothing while every position is needed, for logprobs or a mean."""
        return self.token_bytes if self.prompt_logprobs is None and not self.pools_every_token else b""

    def unpack(self) -> None:
        """Makes token_ids, or brings token_bytes up to date with the output that came before a preemption."""
        if not self.token_ids:
            self.token_ids = decode_tokens(self.token_bytes)
        elif len(self.token_bytes) != len(self.token_ids) * TOKEN_BYTES:
            self.token_bytes = encode_tokens(self.token_ids)

    def take(self, sampled: SampledTokens, now: float) -> RequestOutput:
        """Appends what a step gave, up to the last token it may have, or to a stop token, which the output names.

        The first output brings the prompt's log-probabilities.
        """
        token_ids, known = sampled.token_ids, self.token_ids
        self.sampler_state = sampled.sampler_state
        prompt_logprobs = None
        if not self.has_output:
            self.has_output, self.first_token_s = True, now
            prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        stop_token_id = None
        if len(token_ids) > 1 or token_ids[0] in self.stop_token_ids:
            token_ids, stop_token_id = self._until_stop(token_ids)
        known += token_ids
        return RequestOutput(
            self.request_id,
            token_ids,
            sampled.logprobs if stop_token_id is None else None,
            prompt_logprobs,
            None,
            stop_token_id,
            None,
            self.num_prompt_tokens,
            self.num_cached_tokens,
            len(known) - self.num_prompt_tokens,
        )

    def _until_stop(self, token_ids: list[int]) -> tuple[list[int], int | None]:
        """What it may have of these tokens, and the stop token that ends them."""
        num_known = len(self.token_ids)
        first_to_stop = self.num_prompt_tokens + self.min_tokens - num_known
        taken = token_ids[: self.max_total_tokens - num_known]
        for index, token_id in enumerate(taken):
            if token_id in self.stop_token_ids and index >= first_to_stop:
                return taken[:index], token_id
        num_pending = self.num_known_tokens - num_known - 1  # draws in flight after this one
        self.num_void += min(num_pending, len(token_ids) - 1)
        self.num_known_tokens = max(self.num_known_tokens, num_known + len(taken))
        return taken, None

    def collect_prompt_logprobs(self, first_position: int, logprobs: list[TokenLogprobs]) -> None:
        """Keeps what one chunk gave, for positions from `first_position`. After a preemption they come again."""
        if self.prompt_logprobs is not None and not self.has_output:
            del self.prompt_logprobs[first_position:]
            self.prompt_logprobs += logprobs
            del self.prompt_logprobs[self.num_prompt_tokens - 1 :]

    def vector_output(self, result: StepResult, now: float) -> RequestOutput:
        """All that a one-pass request gives."""
        self.has_output, self.first_token_s = True, now
        return RequestOutput(self.request_id, pooled=result.pooled[self.request_id])

    def final_output(self, reason: FinishReason, now: float, error: ErrorInfo | None = None) -> RequestOutput:
        """An end that brings no token."""
        return self.close(RequestOutput(self.request_id), reason, now, error)

    def close(
        self, output: RequestOutput, reason: FinishReason, now: float, error: ErrorInfo | None = None
    ) -> RequestOutput:
        """Makes `output` the final one."""
        output.finish_reason = reason
        output.error = error
        output.num_prompt_tokens = self.num_prompt_tokens
        output.num_cached_tokens = max(self.num_cached_tokens, 0)
        output.num_output_tokens = self.num_output_tokens
        output.timings = RequestTimings(self.arrival_s, self.scheduled_s, self.first_token_s, now, self.num_preemptions)
        return output

    def check(self, num_in_flight: int) -> None:
        """Asserts what holds for its counts between two calls of the scheduler, with so many steps in flight that
        compute something for it."""
        num_pending = self.num_known_tokens - (len(self.token_ids) or self.num_prompt_tokens)
        assert 0 <= num_pending <= num_in_flight - self.num_void
        assert self.num_known_tokens <= self.max_total_tokens
        assert (self.table is not None) == (self.state is RequestState.RUNNING)
        if self.table is not None:
            assert self.num_finished_tokens <= self.num_computed_tokens <= self.num_slots
            assert self.num_computed_tokens <= self.num_known_tokens
