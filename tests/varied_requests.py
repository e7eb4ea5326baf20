"""Requests of every kind that a step treats apart, and the schedules that they are run under."""

from __future__ import annotations

import random

from penstock.engine.core import EngineCore
from penstock.messages import EngineRequest, FinishReason
from whole_engine import Finished, request

# What each request asks for beside its prompt; the first two are what nearly all requests are.
KINDS = {
    "greedy": {},
    "seeded": {"temperature": 1.3, "seed": 5, "top_p": 0.9, "top_k": 40},
    "penalised": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "edited": {"logit_bias": {7: 3.0, 11: -100.0}, "min_tokens": 6, "bad_words_token_ids": [[5], [9, 7]]},
    "filtered": {"temperature": 1.1, "seed": 9, "dry_multiplier": 0.8, "mirostat": 2, "min_p": 0.02},
    "logprobs": {"logprobs": 3, "temperature": 0.8, "seed": 3, "prompt_logprobs": 1},
}
SCHEDULES = {"batched": {}, "chunked": {"max_num_batched_tokens": 40}, "preempted": {"num_blocks": 24}}


def make_requests(kinds: list[str], count: int, max_tokens: int) -> list[EngineRequest]:
    source = random.Random(2)
    prompts = [[source.randrange(3, 200) for _ in range(source.randint(1, 60))] for _ in range(count)]
    return [
        request(f"{kinds[index % len(kinds)]}-{index}", prompt, max_tokens, **KINDS[kinds[index % len(kinds)]])
        for index, prompt in enumerate(prompts)
    ]


def signature(finished: dict[str, Finished]) -> dict[str, object]:
    return {
        name: (each.token_ids, each.finish_reason, each.logprobs, each.prompt_logprobs)
        for name, each in finished.items()
    }


def run_with_aborts(core: EngineCore, requests: list[EngineRequest], aborts: dict[int, str]) -> dict[str, list[int]]:
    """Every request's tokens. aborts: after so many steps, which request."""
    tokens: dict[str, list[int]] = {each.request_id: [] for each in requests}
    for each in requests:
        core.add(each)
    steps = 0
    while core.has_work():
        for output in core.step():
            tokens[output.request_id] += output.token_ids
        steps += 1
        if steps in aborts:
            core.abort([aborts[steps]], FinishReason.ABORT)
        core.scheduler.check()
    return tokens
