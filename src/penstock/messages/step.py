"""One step's plan and result: what the scheduler tells the runner, and what comes back.

A request is described in full once (NewRequestData); afterwards only what changed crosses (ScheduledRequest).
"""

from __future__ import annotations

import msgspec

from penstock.messages.engine import ErrorInfo, TokenLogprobs
from penstock.messages.pooling import PoolingParams
from penstock.messages.sampling import SamplingParams


class BlockCopy(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Copy a block in every layer, within the pool, or between it and the slots of the host tier."""

    source: int
    destination: int


class NewRequestData(msgspec.Struct, array_like=True, gc=False):
    """A request entering (or, after preemption, re-entering) the runner.

    token_ids: prompt and, after preemption, the output so far. num_prompt_tokens: how many of them are prompt.
    pooling: set for a one-pass request, which draws nothing: where others sample, it gives its vector.
    sampler_state: what its last draw gave, see SampledTokens.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]
    pooling: PoolingParams | None = None
    sampler_state: float | None = None


class ScheduledRequest(msgspec.Struct, array_like=True, gc=False):
    """One request's share of a step: positions [num_computed_tokens, num_computed_tokens + num_tokens).

    new_block_ids: appended to the request's block table before the step (tables are append-only).
    samples: true when the step reaches the request's last known token, so that a new token is drawn.
    """

    request_id: str
    num_computed_tokens: int
    num_tokens: int
    new_block_ids: list[int]
    samples: bool


class SchedulerOutput(msgspec.Struct, array_like=True):
    """The plan of one step. Applied in this order: removed, new, offloads, restores, block_copies, scheduled.

    removed_request_ids: finished, aborted or preempted since the last plan; their rows are free again.
    block_copies: for prefix hits that ended inside a block. offloads: blocks to slots of the host tier; the sources
    were written by steps that have been updated, and this step may overwrite them. restores: slots to blocks, which
    steps in flight may still write, and which later steps read, or already this one if `awaits_restores`.
    """

    step_id: int
    scheduled: list[ScheduledRequest]
    new_requests: list[NewRequestData]
    removed_request_ids: list[str]
    block_copies: list[BlockCopy]
    num_tokens: int
    offloads: list[BlockCopy] = []
    restores: list[BlockCopy] = []
    awaits_restores: bool = False


class SampledTokens(msgspec.Struct, array_like=True, gc=False):
    """Tokens drawn for a request in a step (several when drafts were accepted), with log-probabilities if asked.

    is_complete: with the last of its max_tokens the request's grammar is satisfied, so nothing is cut off.
    sampler_state: what the next draw needs beside the tokens (mirostat's limit); None where tokens are enough.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    is_complete: bool = False
    sampler_state: float | None = None


class StepResult(msgspec.Struct, array_like=True):
    """The result of one step. Every scheduled request that samples is in `sampled`, in `pooled` or in `errors`.

    prompt_logprobs: by request, for the prompt positions this step computed (position p predicts p + 1).
    seconds: duration of the step on the device. pooled: of the one-pass requests that ended, little-endian float32.
    """

    step_id: int
    sampled: dict[str, SampledTokens]
    prompt_logprobs: dict[str, list[TokenLogprobs]]
    errors: dict[str, ErrorInfo]
    seconds: float
    pooled: dict[str, bytes] = {}
