"""The largest step that an engine may be asked for, run once before its KV cache is made, to learn what it takes.

All the tokens and all the rows that a step may have, the first request in a context of full length (so the tables are
as wide as they get), every row drawing with log-probabilities and edited logits, log-probabilities of a prompt; beside
it, as much as the step before it would still hold for grammars, and as penalties of long contexts take. Every block of
the tables is the one that the pool has yet: what is computed means nothing. A model of vectors also pools such a step.

Then smaller ones, in the other tiles of the matrix kernels: what Triton compiles at its first use is compiled before
anybody waits for it.

Owns: nothing.
Never: leaves a request in the runner.
"""

from __future__ import annotations

from typing import Final, Protocol

import msgspec
import torch
from torch import Tensor

from penstock.config.engine import EngineConfig
from penstock.messages import NewRequestData, PoolingParams, SamplingParams, ScheduledRequest, SchedulerOutput
from penstock.messages.bounds import BOUNDS, MAX_ENTRIES
from penstock.runner.prompt_scores import ROWS_PER_PIECE
from penstock.sampling.deferred import MOST_PENALISED, PENALISED_NBYTES

PROBE_BLOCKS: Final = 1
TILE_TOKENS: Final = (16, 32, 64)  # the most that the smaller tiles take (kernels/triton/configs)
_PROMPT_POSITIONS: Final = ROWS_PER_PIECE + 1  # the last one is not scored


class Profiled(Protocol):
    """runner.ModelRunner."""

    def try_out(self, output: SchedulerOutput) -> None: ...


def run_largest_steps(runner: Profiled, config: EngineConfig, device: torch.device) -> None:
    """Raises what the device raises when it has no room (torch.OutOfMemoryError)."""
    kinds: list[PoolingParams | None] = []
    if "generate" in config.model.tasks:
        kinds.append(None)
    if config.model.pooler.labels:
        kinds.append(PoolingParams(kind="classify"))
    elif "embed" in config.model.tasks:
        kinds.append(PoolingParams(kind="embed"))
    for pooling in kinds:
        output = largest_step(config, pooling)
        held = held_beside(config, len(output.scheduled), device) if pooling is None else ()
        runner.try_out(output)
        del held
        if pooling is None:
            for size in TILE_TOKENS:
                if size < output.num_tokens:
                    runner.try_out(largest_step(_limited(config, size), None))


def held_beside(config: EngineConfig, num_rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """As large as a step's masks, the logits that it keeps until its draws have been heard of, its penalties, and its
    token ids where draws are among them that the host has not heard of."""
    vocab_size = config.model.vocab_size
    penalised = min(MOST_PENALISED, num_rows * min(vocab_size, config.scheduler.max_model_len))
    return (
        torch.empty((num_rows, -(-vocab_size // 32)), dtype=torch.int32, device=device),
        torch.empty((num_rows, vocab_size), dtype=torch.float32, device=device),
        torch.empty((penalised, PENALISED_NBYTES), dtype=torch.uint8, device=device),
        torch.empty((3, config.scheduler.max_num_batched_tokens), dtype=torch.int64, device=device),
    )


def largest_step(config: EngineConfig, pooling: PoolingParams | None) -> SchedulerOutput:
    """As many requests as run at once, and as many tokens as a step takes."""
    limits, block_size = config.scheduler, config.cache.block_size
    longest = limits.max_model_len
    num_requests = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    left = limits.max_num_batched_tokens - num_requests
    output = SchedulerOutput(0, [], [], [], [], 0)
    for index in range(num_requests):
        num_tokens = 1 + min(left, longest - 1)
        left -= num_tokens - 1
        context = longest if index == 0 and not config.model.is_encoder else num_tokens
        start = context - num_tokens
        num_prompt = start + min(num_tokens, _PROMPT_POSITIONS) if index == 0 else context
        request_id = f"largest-{index}"
        sampling = _sampling(config, scores_prompt=index == 0) if pooling is None else SamplingParams()
        token_ids = [position % config.model.vocab_size for position in range(context)]
        output.new_requests.append(
            NewRequestData(request_id, token_ids, num_prompt if pooling is None else context, sampling, (0,), pooling)
        )
        blocks = [] if config.model.is_encoder else [0] * -(-context // block_size)
        output.scheduled.append(ScheduledRequest(request_id, start, num_tokens, blocks, True))
        output.num_tokens += num_tokens
    return output


def _limited(config: EngineConfig, num_tokens: int) -> EngineConfig:
    limits = config.scheduler
    num_seqs = min(limits.max_num_seqs, num_tokens)
    limits = msgspec.structs.replace(limits, max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)
    return msgspec.structs.replace(config, scheduler=limits)


def _sampling(config: EngineConfig, *, scores_prompt: bool) -> SamplingParams:
    most = int(BOUNDS["logprobs"][1])
    vocab_size = config.model.vocab_size
    most_excluded = 2 * MAX_ENTRIES["bad_words"] + MAX_ENTRIES["stop_token_ids"]  # a word also begins with a space
    return SamplingParams(
        temperature=1.0,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        seed=1,
        logprobs=most,
        prompt_logprobs=most if scores_prompt else None,
        logit_bias=dict.fromkeys(range(min(vocab_size, MAX_ENTRIES["logit_bias"])), 1.0),
        bad_words_token_ids=tuple((token,) for token in range(1, min(vocab_size - 1, most_excluded))),
        min_tokens=1,
    )
