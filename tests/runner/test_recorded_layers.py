"""Layers whose kernel calls are remembered compute, bit for bit, what the same layers compute call by call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from driving import Driver, make_runner
from test_gguf_models import PROMPTS, SIZES, mixed

from checkpoints import write_checkpoint
from gguf_files import write_gguf
from penstock.kernels import ops as op_table
from penstock.kernels.native import recording
from penstock.kernels.ops import Layers, Ops
from penstock.runner import ModelRunner

CASES: dict[str, dict[str, Any]] = {
    "llama-biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral-window": {"family": "mistral", "sliding_window": 24},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 18},
    "mixtral": {"family": "mixtral"},
    "qwen2-moe": {"family": "qwen2-moe", "mlp_only_layers": [1]},
    "qwen3-moe": {"family": "qwen3-moe", "norm_topk_prob": True},
}


def generated(runner: ModelRunner, chunk: int | None) -> list[Any]:
    """Tokens and log-probabilities; the requests end one after another, so that steps have 3, 2 and 1 rows."""
    driver = Driver(runner)
    sequences = [driver.start(str(index), prompt, logprobs=3) for index, prompt in enumerate(PROMPTS)]
    for count in range(len(sequences)):
        driver.generate(sequences[: len(sequences) - count], 6 * (count + 1), chunk)
    assert all(sequence.error is None for sequence in sequences)
    return [(sequence.output, sequence.logprobs) for sequence in sequences]


def is_remembered(runner: ModelRunner) -> bool:
    return runner.ops.recordings.is_made


def compare(path: Path, chunk: int | None = 40, **overrides: Any) -> None:
    remembering, plain = make_runner(path, **overrides), make_runner(path, **overrides)
    plain.ops.recordings.is_on = False
    assert generated(remembering, chunk) == generated(plain, chunk)
    assert is_remembered(remembering)
    assert not is_remembered(plain)


@pytest.mark.parametrize("case", CASES)
def test_families(case: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", **{**SIZES, **CASES[case]})
    compare(tmp_path / "model")


def test_quantised_in_two_threads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", **SIZES)
    compare(tmp_path / "model", dtype="bfloat16", quantization="int4", num_threads=2)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_step_of_many_tokens(quantization: str | None, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", **SIZES)
    compare(tmp_path / "model", chunk=None, dtype="bfloat16", quantization=quantization)


def test_parts_of_different_formats(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / "model",
        tokenizer=True,
        **{**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8},
    )
    write_gguf(tmp_path / "model.gguf", tmp_path / "model", mixed)
    compare(tmp_path / "model.gguf", load_format="gguf", dtype="bfloat16")


def tried(layers: Layers) -> tuple[torch.Tensor | None, Ops]:
    """What the recordings of fresh ops make of `layers` for three tokens."""
    ops = op_table.load("native", 1)
    ops.recordings.is_on = True
    return ops.recordings.run(layers, torch.ones(3, 32), tuple(torch.zeros(3, 4) for _ in range(6)), []), ops


def test_what_is_more_than_kernels_is_not_remembered() -> None:
    plain, constant_TD = op_table.load("native", 1), torch.ones(2, 32)
    weight = op_table.pack_linear(plain, [torch.randn(32, 32)], torch.float32)
    linear, ops = tried(lambda ops, residual_TD, *_: ops.linear(residual_TD, weight))
    assert torch.equal(linear, plain.linear(torch.ones(3, 32), weight))
    assert ops.recordings.is_made
    for layers in (
        lambda ops, residual_TD, *_: ops.linear(residual_TD, weight) + 1.0,
        lambda ops, residual_TD, *_: ops.gelu(residual_TD),
        lambda ops, *_: ops.linear(constant_TD, weight),  # no input
        lambda ops, residual_TD, *_: residual_TD,
    ):
        result, ops = tried(layers)
        assert result is None
        assert not ops.recordings.is_made


def test_large_steps_are_run_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "model", **SIZES)
    monkeypatch.setattr(recording, "MAX_TOKENS", 0)
    runner = make_runner(tmp_path / "model")
    generated(runner, chunk=40)
    assert not is_remembered(runner)
