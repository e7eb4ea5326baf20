"""Generation through ModelRunner.execute against transformers, and bit-equality however requests are batched."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch
from driving import Driver, make_runner

from checkpoints import write_checkpoint

MAX_TOKENS = 24
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "qwen2-moe": {"norm_topk_prob": True, "mlp_only_layers": [1]},
}


def random_prompts(count: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(vocab_size) for _ in range(source.randint(1, 90))] for _ in range(count)]


@torch.inference_mode()
def their_greedy(model, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of transformers, and its log-probabilities [len(prompt) + count - 1, V] at every position."""
    ids = torch.tensor([prompt])
    # An explicit mask: transformers would take token 0 in a prompt for padding.
    mask = torch.ones_like(ids)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None)
    logprobs = model(tokens[:, :-1]).logits[0].log_softmax(-1)
    return tokens[0, len(prompt) :].tolist(), logprobs


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logprobs_equal_those_of_transformers(family, kernels, tmp_path):
    model = write_checkpoint(tmp_path, family, **FAMILIES[family])
    prompts = random_prompts(16 if kernels == "native" else 6, 211)
    driver = Driver(make_runner(tmp_path, kernels=kernels))
    ours = [driver.start(f"r{i}", prompt, logprobs=3, prompt_logprobs=2) for i, prompt in enumerate(prompts)]
    driver.generate(ours[:1], MAX_TOKENS)
    driver.generate(ours[1:], MAX_TOKENS, chunk=23)
    for sequence, prompt in zip(ours, prompts, strict=True):
        tokens, logprobs = their_greedy(model, prompt, MAX_TOKENS)
        assert sequence.output == tokens
        assert [entry.token_id for entry in sequence.prompt_logprobs] == prompt[1:]
        entries = sequence.prompt_logprobs + sequence.logprobs
        assert len(entries) == len(logprobs)
        for entry, expected in zip(entries, logprobs, strict=True):
            count = len(entry.top_ids)
            assert count == (2 if entry in sequence.prompt_logprobs else 3)
            assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-4)
            top = expected.topk(count)
            assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)
            assert entry.rank == int((expected > expected[entry.token_id]).sum()) + 1


SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "logprobs": 2, "repetition_penalty": 1.2}


def outcome(sequence) -> tuple:
    return sequence.output, msgspec.json.encode([sequence.logprobs, sequence.prompt_logprobs])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_bit_equal_in_any_batch_and_chunking(family, dtype, tmp_path):
    """Alone and whole, together, in chunks of several sizes, staggered, and recomputed after preemption."""
    write_checkpoint(tmp_path, family, **FAMILIES[family])
    driver = Driver(make_runner(tmp_path, dtype=dtype, num_threads=2 if dtype == "bfloat16" else 1))
    prompts = random_prompts(12, 211, seed=3)

    def start(label: str) -> list:
        return [
            driver.start(f"{label}{i}", prompt, **({} if i % 2 else {**SAMPLED, "seed": i}), prompt_logprobs=1)
            for i, prompt in enumerate(prompts)
        ]

    alone = start("alone")
    for sequence in alone:
        driver.generate([sequence], MAX_TOKENS)
    expected = [outcome(sequence) for sequence in alone]
    for chunk in (None, 1, 7, 16, 33):
        together = start(f"chunk{chunk}-")
        driver.generate(together, MAX_TOKENS, chunk)
        assert [outcome(sequence) for sequence in together] == expected, chunk

    staggered = start("staggered")
    running: list = []
    for joining in staggered:
        running.append(joining)
        driver.step(running, 11)
        driver.step(running, 11)
    driver.generate(running, MAX_TOKENS, 11)
    assert [sequence.output[:MAX_TOKENS] for sequence in staggered] == [tokens for tokens, _ in expected]

    preempted = start("preempted")
    for sequence in preempted:
        sequence.sampling = msgspec.structs.replace(sequence.sampling, prompt_logprobs=None)
    for _ in range(9):
        driver.step(preempted)
    for sequence in preempted[::2]:
        driver.finish(sequence)
    driver.step(preempted[1::2])
    driver.generate(preempted, MAX_TOKENS, chunk=13)
    assert [sequence.output for sequence in preempted] == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_long_prompt_is_bit_equal_however_it_is_chunked(dtype, tmp_path):
    """Longer than the pieces of the feed-forward block and the splits of the attention, with and without a window."""
    write_checkpoint(
        tmp_path, "qwen2", max_position_embeddings=2048, use_sliding_window=True, sliding_window=300,
        max_window_layers=1,
    )  # fmt: skip
    source = random.Random(8)
    prompt = [source.randrange(211) for _ in range(1100)]
    found = []
    for first, chunk in ((1100, None), (300, 300), (513, 513), (1060, 1)):
        runner = make_runner(tmp_path, dtype=dtype, max_model_len=1200, max_num_batched_tokens=1200)
        driver = Driver(runner)
        sequence = driver.start("long", prompt, prompt_logprobs=1, logprobs=1)
        driver.step([sequence], first)
        driver.generate([sequence], 20, chunk)
        found.append(outcome(sequence))
    assert found.count(found[0]) == len(found)


def test_a_block_copied_from_another_request_continues_it_exactly(tmp_path):
    """A prefix hit that ends inside a block: its blocks are shared, the last one copied."""
    from penstock.messages import BlockCopy, NewRequestData, SamplingParams, ScheduledRequest, SchedulerOutput

    write_checkpoint(tmp_path)
    runner = make_runner(tmp_path)
    prompt = random_prompts(1, 211, seed=5)[0] * 4
    prompt = prompt[:45]
    greedy = SamplingParams(temperature=0.0, seed=0, logprobs=5)
    first = NewRequestData("first", prompt, 45, greedy, ())
    whole = runner.execute(SchedulerOutput(0, [ScheduledRequest("first", 0, 45, [4, 9, 2], True)], [first], [], [], 45))
    second = NewRequestData("second", prompt, 45, greedy, ())
    hit = ScheduledRequest("second", 40, 5, [4, 9, 7], True)
    result = runner.execute(SchedulerOutput(1, [hit], [second], [], [BlockCopy(2, 7)], 5))
    assert result.sampled["second"] == whole.sampled["first"]
