"""What the queue takes in, and what it refuses with which words."""

from __future__ import annotations

from penstock.base.errors import ContextOverflowError, QueueFullError, ValidationError
from penstock.config.engine import SchedulerConfig
from penstock.kvcache import KVCacheManager
from penstock.messages import EngineRequest
from penstock.scheduler.drain_rate import DrainRate
from penstock.scheduler.waiting_queue import WaitingQueue


def check_acceptable(request: EngineRequest, config: SchedulerConfig, kv_cache: KVCacheManager) -> None:
    """Raises ContextOverflowError or ValidationError for a request that could never run to its end."""
    num_prompt = len(request.prompt_token_ids)
    if num_prompt == 0:
        raise ValidationError("The prompt is empty.", param="prompt")
    if request.max_tokens < 1:
        raise ValidationError("max_tokens must be at least 1.", param="max_tokens")
    if request.pooling is not None and request.max_tokens != 1:
        raise ValidationError("A one-pass request has max_tokens 1.", param="max_tokens")
    num_drawn = request.max_tokens if request.pooling is None else 0
    if config.is_encoder:
        check_encodable(request, config)
        return
    if num_prompt + num_drawn > config.max_model_len:
        raise ContextOverflowError(
            f"The prompt has {num_prompt} tokens and max_tokens is {num_drawn}; together they exceed the "
            f"context of {config.max_model_len} tokens.",
            remedy="Shorten the prompt or lower max_tokens.",
        )
    num_blocks = kv_cache.blocks_for(num_prompt + request.max_tokens - 1)
    if num_blocks > kv_cache.num_blocks:
        raise ValidationError(
            f"The request can need {num_blocks} blocks of {kv_cache.block_size} tokens (prompt {num_prompt}, "
            f"max_tokens {request.max_tokens}), but the KV cache has {kv_cache.num_blocks}.",
            remedy="Lower max_tokens, or give the engine more memory.",
        )


def check_encodable(request: EngineRequest, config: SchedulerConfig) -> None:
    """Raises ContextOverflowError or ValidationError for what an encoder cannot take whole, in one step."""
    if request.pooling is None:
        raise ValidationError("This model is an encoder: it does not generate.", param="model")
    num_tokens, longest = len(request.prompt_token_ids), min(config.max_model_len, config.max_num_batched_tokens)
    if num_tokens > longest:
        raise ContextOverflowError(
            f"The text has {num_tokens} tokens; an encoder reads a text whole, at most {longest} tokens of it.",
            remedy="Shorten the text.",
        )


def check_room(num_prompt: int, config: SchedulerConfig, waiting: WaitingQueue, drain: DrainRate) -> None:
    """Raises QueueFullError when a prompt of that length would overfill the queue.

    An empty queue takes a prompt of any length: it could not get in otherwise.
    """
    num_excess_requests = waiting.num_requests + 1 - config.max_num_queued_requests
    num_excess_tokens = waiting.num_tokens + num_prompt - config.max_num_queued_tokens
    if num_excess_requests <= 0 and (num_excess_tokens <= 0 or waiting.num_requests == 0):
        return
    raise QueueFullError(
        f"The queue is full: {waiting.num_requests} requests with {waiting.num_tokens} prompt tokens wait "
        f"(limits: {config.max_num_queued_requests} and {config.max_num_queued_tokens}).",
        retry_after_s=drain.retry_after_s(max(num_excess_requests, 0), max(num_excess_tokens, 0)),
        remedy="Retry later.",
    )
