"""Building blocks of the scheduler's tests: small schedulers, requests and results."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.config.engine import CacheConfig, SchedulerConfig
from penstock.kvcache import KVCacheManager
from penstock.messages import EngineRequest, RequestOutput, SampledTokens, SamplingParams, SchedulerOutput, StepResult
from penstock.scheduler import Scheduler

BLOCK_SIZE = 4
TOKEN = 9

CONFIG = SchedulerConfig(
    max_num_seqs=8,
    max_num_batched_tokens=16,
    max_model_len=64,
    max_num_queued_requests=8,
    max_num_queued_tokens=400,
    watermark_blocks=0,
)


def scheduler_of(num_blocks: int = 32, *, caching: bool = True, **changes: Any) -> tuple[Scheduler, KVCacheManager]:
    """A scheduler with CONFIG, changed by keyword, over blocks of 4 tokens."""
    cache = CacheConfig(block_size=BLOCK_SIZE, num_blocks=num_blocks, enable_prefix_caching=caching)
    kv = KVCacheManager(cache)
    return Scheduler(msgspec.structs.replace(CONFIG, **changes), kv), kv


def request_of(request_id: str, prompt: list[int], max_tokens: int = 8, **changes: Any) -> EngineRequest:
    sampling = changes.pop("sampling", SamplingParams())
    return EngineRequest(
        request_id=request_id, prompt_token_ids=prompt, sampling=sampling, max_tokens=max_tokens, **changes
    )


def result_of(output: SchedulerOutput, **tokens: int) -> StepResult:
    """Every share that samples draws TOKEN, or what `tokens` names for its request."""
    sampled = {
        share.request_id: SampledTokens([tokens.get(share.request_id, TOKEN)])
        for share in output.scheduled
        if share.samples
    }
    return StepResult(output.step_id, sampled, {}, {}, 0.01)


def planned(scheduler: Scheduler, now: float = 0.0) -> SchedulerOutput:
    output = scheduler.schedule(now)
    scheduler.check()
    assert output is not None
    return output


def step(scheduler: Scheduler, now: float = 0.0, **tokens: int) -> list[RequestOutput]:
    """Plans a step and applies its result, nothing in flight meanwhile."""
    output = planned(scheduler, now)
    outputs = scheduler.update(output, result_of(output, **tokens), now)
    scheduler.check()
    return outputs


def shares(output: SchedulerOutput) -> list[tuple[str, int, int, bool]]:
    """(request id, first position, tokens, samples) of each share, in order."""
    return [(s.request_id, s.num_computed_tokens, s.num_tokens, s.samples) for s in output.scheduled]
