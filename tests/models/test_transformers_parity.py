"""Every family against transformers in float32: logits at every position, whatever the chunking and block order."""

from __future__ import annotations

import random

import pytest
import torch

from checkpoints import write_checkpoint
from penstock.config.engine import CacheConfig, EngineConfig, SchedulerConfig
from penstock.kernels import ops as op_table
from penstock.layers import AttentionMetadata
from penstock.loader import read_model_config
from penstock.runner.kv_pool import KVPool
from penstock.runner.loading import load_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "factor": 4.0,
}

CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-mha": ("llama", {"num_key_value_heads": 6, "head_dim": 10}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama3-rope": ("llama", {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}}),
    "llama-yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    ),
    "llama-yarn-mscale": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "mscale": 0.7,
                "mscale_all_dim": 1.3,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
            }
        },
    ),
    "llama-longrope-short": ("llama", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 512}}),
    "llama-longrope-long": ("llama", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 64}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-bias": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 32}),
    "qwen3-window": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 17,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": ("mixtral", {"sliding_window": 40}),
    "mixtral-one-expert": ("mixtral", {"num_experts_per_tok": 1}),
    "qwen2-moe": ("qwen2-moe", {}),
    "qwen2-moe-renormalised": ("qwen2-moe", {"norm_topk_prob": True, "mlp_only_layers": [2]}),
    "qwen3-moe": ("qwen3-moe", {"norm_topk_prob": False}),
    "qwen3-moe-renormalised": ("qwen3-moe", {"norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen3-moe-dense-layers": ("qwen3-moe", {"decoder_sparse_step": 2, "num_experts_per_tok": 6}),
}
MAX_MODEL_LEN = 512
PROMPT_LENS = (1, 97, 130)


def our_config(path, kernels: str) -> EngineConfig:
    limits = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=512,
        max_model_len=MAX_MODEL_LEN,
        max_num_queued_requests=8,
        max_num_queued_tokens=4096,
        watermark_blocks=0,
    )
    return EngineConfig(
        model_path=str(path),
        model=read_model_config(path),
        load_format="safetensors",
        dtype="float32",
        seed=0,
        num_threads=1,
        kernels=kernels,
        max_memory_bytes=1 << 30,
        cache=CacheConfig(block_size=16, num_blocks=64),
        scheduler=limits,
    )


def chunked_logits(config: EngineConfig, prompts: list[list[int]], chunks: list[int]) -> list[torch.Tensor]:
    """Logits [length, V] of each prompt, computed together in chunks of the given sizes, in shuffled blocks."""
    ops = op_table.load(config.kernels, config.num_threads)
    model = load_model(config, ops, lambda fraction: None)
    pool = KVPool(config.model, config.cache.num_blocks, torch.float32, ops.layouts)
    order = list(range(config.cache.num_blocks))
    random.Random(1).shuffle(order)
    width = -(-max(map(len, prompts)) // 16)
    tables = [[order.pop() for _ in range(width)] for _ in prompts]
    done, logits = [0] * len(prompts), [[] for _ in prompts]
    for chunk in [*chunks, *[10**6]]:
        active = [index for index, prompt in enumerate(prompts) if done[index] < len(prompt)]
        if not active:
            break
        ends = {index: min(done[index] + chunk, len(prompts[index])) for index in active}
        positions = {index: list(range(done[index], ends[index])) for index in active}
        starts = [0]
        for index in active:
            starts.append(starts[-1] + len(positions[index]))
        metadata = AttentionMetadata(
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([ends[index] for index in active], dtype=torch.int32),
            torch.tensor([tables[index] for index in active], dtype=torch.int32),
            torch.tensor([tables[index][p // 16] * 16 + p % 16 for index in active for p in positions[index]]),
        )
        tokens = torch.tensor([prompts[index][p] for index in active for p in positions[index]])
        flat = torch.tensor([p for index in active for p in positions[index]])
        x, residual = model.forward(tokens, flat, pool.caches, metadata, ops)
        rows = model.logits(x, residual, ops)
        for place, index in enumerate(active):
            logits[index].append(rows[starts[place] : starts[place + 1]])
            done[index] = ends[index]
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_equal_those_of_transformers(case, kernels, tmp_path):
    family, overrides = CASES[case]
    theirs = write_checkpoint(tmp_path, family, **overrides)
    source = random.Random(case)
    prompts = [[source.randrange(theirs.config.vocab_size) for _ in range(length)] for length in PROMPT_LENS]
    ours = chunked_logits(our_config(tmp_path, kernels), prompts, [50, 7, 1, 33])
    for prompt, logits in zip(prompts, ours, strict=True):
        expected = theirs(torch.tensor([prompt])).logits[0]
        if case == "llama-longrope-long" and len(prompt) <= 64:
            continue  # transformers uses the short factors for a short sequence; see layers/rotary.py
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_dynamic_rope_is_fixed_by_the_longest_sequence(tmp_path):
    """At exactly max_model_len tokens, transformers' recomputed frequencies are ours."""
    rope = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0}
    theirs = write_checkpoint(tmp_path, "llama", max_position_embeddings=128, rope_parameters=rope)
    prompt = [random.Random(0).randrange(211) for _ in range(MAX_MODEL_LEN)]
    [logits] = chunked_logits(our_config(tmp_path, "reference"), [prompt], [200, 100])
    torch.testing.assert_close(logits, theirs(torch.tensor([prompt])).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.inference_mode()
def test_half_precision_checkpoints_are_widened_exactly(dtype, tmp_path):
    theirs = write_checkpoint(tmp_path, "llama", dtype=dtype, attention_bias=True)
    prompt = list(range(40))
    [logits] = chunked_logits(our_config(tmp_path, "reference"), [prompt], [40])
    torch.testing.assert_close(logits, theirs(torch.tensor([prompt])).logits[0], rtol=1e-4, atol=1e-4)
