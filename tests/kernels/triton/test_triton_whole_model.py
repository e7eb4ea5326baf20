"""A whole engine on the Triton kernels, interpreted, gives the reference's tokens; on a GPU, so does the GPU."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch

from checkpoints import write_checkpoint
from delayed_device import DelayedBackend, delayed_device
from penstock.config.engine import EngineConfig
from penstock.runner import graph_policy, model_runner
from whole_engine import build, engine_config, request, run

FAMILIES = {
    "qwen3": {"family": "qwen3", "tie_word_embeddings": True},
    "mistral": {"family": "mistral", "sliding_window": 24},
    "qwen2-moe": {"family": "qwen2-moe", "num_hidden_layers": 2},
}


def small_config(path: Path, kernels: str, device: str = "cpu") -> EngineConfig:
    config = engine_config(path, kernels=kernels, num_blocks=24, max_num_seqs=4, max_num_batched_tokens=32)
    return msgspec.structs.replace(config, device=device)


def tokens_of(config: EngineConfig) -> dict[str, list[int]]:
    source = random.Random(3)
    prompts = [[source.randrange(3, 90) for _ in range(length)] for length in (1, 37, 18)]
    requests = [request(f"r{index}", prompt, 4) for index, prompt in enumerate(prompts)]
    # Another, seeded, with a penalty: what is drawn is no argmax and depends on what came before.
    requests.append(request("drawn", prompts[1][:20], 4, temperature=0.9, seed=4, top_k=20, repetition_penalty=1.2))
    return {name: finished.token_ids for name, finished in run(build(config), requests, 4).items()}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_interpreted_kernels_give_the_references_tokens(tmp_path, family):
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    write_checkpoint(tmp_path, **FAMILIES[family])
    assert tokens_of(small_config(tmp_path, "triton")) == tokens_of(small_config(tmp_path, "reference"))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in rows that are padding
def test_replayed_steps_of_interpreted_kernels_give_the_references_tokens(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    write_checkpoint(tmp_path, **FAMILIES["mistral"])
    backend = DelayedBackend()
    monkeypatch.setattr(graph_policy, "MIN_USES", 1)
    monkeypatch.setattr(graph_policy, "STEPS_APART", 1)
    requests = [
        request("one", [5, 6, 7, 8], 4),
        request("two", [9], 4, repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.3),
        request("three", [3, 4], 3),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(model_runner, "step_device", lambda config, _device: delayed_device(config, backend))
        found = run(build(small_config(tmp_path, "triton")), requests, 3)
    assert "replay" in backend.log
    expected = run(build(small_config(tmp_path, "reference")), requests, 3)
    assert [each.token_ids for each in found.values()] == [each.token_ids for each in expected.values()]


@pytest.mark.gpu
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_gpu_gives_the_references_tokens(tmp_path, family):
    write_checkpoint(tmp_path, **FAMILIES[family])
    assert tokens_of(small_config(tmp_path, "triton", "cuda")) == tokens_of(small_config(tmp_path, "reference"))
