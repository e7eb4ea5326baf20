"""Whole engine against transformers: 64 prompts a family, alone and at concurrency 32, however they are scheduled."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import write_checkpoint
from penstock.messages import EngineRequest
from whole_engine import Finished, build, engine_config, request, run

NUM_PROMPTS = 64
MAX_TOKENS = 20
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama3-rope": {
        "family": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"family": "mistral", "sliding_window": 24},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3"},
}  # fmt: skip

# name: engine settings, concurrency. A pool of 40 blocks holds about a fifth of what 32 requests want: preemption.
SCHEDULES: dict[str, tuple[dict[str, Any], int]] = {
    "alone": ({"prefix_caching": False}, 1),
    "batched": ({"prefix_caching": False}, 32),
    "chunked": ({"prefix_caching": False, "max_num_batched_tokens": 40}, 32),
    "prefix hits": ({"max_num_batched_tokens": 48}, 32),
    "preempted": ({"num_blocks": 40, "max_num_batched_tokens": 64}, 32),
}


def make_prompts(vocab_size: int) -> list[list[int]]:
    """Lengths from 1 to 90; a third of them begin with one of two shared prefixes, one cut inside a block."""
    rng = random.Random(5)
    prefixes = [[rng.randrange(3, vocab_size) for _ in range(length)] for length in (32, 41)]
    prompts = []
    for index in range(NUM_PROMPTS):
        tail = [rng.randrange(3, vocab_size) for _ in range(rng.randint(1, 60))]
        prompts.append(prefixes[index % 2] + tail[:49] if index % 3 == 0 else tail)
    return prompts


@pytest.fixture(scope="module", params=list(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    return path, write_checkpoint(path, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def expected(checkpoint: tuple[Path, Any]) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities by transformers, one prompt at a time."""
    _, model = checkpoint
    results = []
    torch.set_num_threads(1)  # so small a model only waits for a second one
    with torch.inference_mode():
        for prompt in make_prompts(model.config.vocab_size):
            tokens = model.generate(
                torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0].tolist()
            logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            output = tokens[len(prompt) :]
            results.append((output, [logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(output)]))
    return results


def make_requests(vocab_size: int, **sampling: object) -> list[EngineRequest]:
    prompts = make_prompts(vocab_size)
    return [request(str(index), prompt, MAX_TOKENS, **sampling) for index, prompt in enumerate(prompts)]


def run_schedule(path: Path, name: str, requests: list[EngineRequest]) -> dict[str, Finished]:
    settings, concurrency = SCHEDULES[name]
    core = build(engine_config(path, **settings))
    try:
        finished = run(core, requests, concurrency)
        if name == "preempted":
            assert sum(one.num_preemptions for one in finished.values()) > 0, "the pool was meant to be too small"
        if name == "prefix hits":
            assert core.stats().num_cached_prompt_tokens > 0, "the prompts were meant to share prefixes"
        return finished
    finally:
        core.close()


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_greedy_tokens_and_logprobs_equal_transformers(
    checkpoint: tuple[Path, Any], expected: list[tuple[list[int], list[float]]], schedule: str
) -> None:
    path, model = checkpoint
    finished = run_schedule(path, schedule, make_requests(model.config.vocab_size, logprobs=2))
    for index, (tokens, logprobs) in enumerate(expected):
        one = finished[str(index)]
        assert one.token_ids == tokens, f"prompt {index}"
        assert [entry.logprob for entry in one.logprobs] == pytest.approx(logprobs, abs=1e-4)


def test_results_are_bit_identical_under_every_schedule(checkpoint: tuple[Path, Any]) -> None:
    """Seeded sampling with every filter, in bfloat16: tokens and log-probabilities equal to the last bit."""
    path, model = checkpoint
    reference: dict[str, tuple[list[int], list[float]]] | None = None
    for name, (settings, concurrency) in SCHEDULES.items():
        requests = [
            request(
                str(index), prompt, MAX_TOKENS, temperature=0.9, seed=index, top_p=0.9, top_k=40, min_p=0.01,
                repetition_penalty=1.1, presence_penalty=0.2, logprobs=3,
            )
            for index, prompt in enumerate(make_prompts(model.config.vocab_size))
        ]  # fmt: skip
        core = build(engine_config(path, dtype="bfloat16", **settings))
        finished = run(core, requests, concurrency)
        core.close()
        seen = {key: (one.token_ids, [entry.logprob for entry in one.logprobs]) for key, one in finished.items()}
        reference = reference or seen
        assert seen == reference, name


def test_prompt_logprobs_equal_transformers(checkpoint: tuple[Path, Any]) -> None:
    path, model = checkpoint
    requests = make_requests(model.config.vocab_size, prompt_logprobs=1)[:16]
    core = build(engine_config(path, max_num_batched_tokens=40))
    finished = run(core, requests, 8)
    core.close()
    with torch.inference_mode():
        for one in requests:
            prompt = one.prompt_token_ids
            logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            given = finished[one.request_id].prompt_logprobs
            assert given is not None
            expected = [logprobs[position - 1, prompt[position]].item() for position in range(1, len(prompt))]
            assert [entry.logprob for entry in given] == pytest.approx(expected, abs=1e-4)
