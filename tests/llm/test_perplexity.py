"""Perplexity and divergence against transformers' logits, and the command that prints them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from checkpoints import write_checkpoint
from penstock.base.errors import ValidationError
from penstock.cli.main import main
from penstock.llm.perplexity import Predictor, compare
from whole_engine import engine_config

TOKENS = [(7 * index * index + 3 * index) % 290 + 3 for index in range(150)]
WINDOW = 64
SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("model")
    return path, write_checkpoint(path, tokenizer=True, **SIZES)


def predictor(path: Path, quantization: str | None = None) -> Predictor:
    config = engine_config(path, max_model_len=WINDOW)
    return Predictor(msgspec.structs.replace(config, quantization=quantization), lambda share: None)


def expected_log_probabilities(model: Any) -> list[torch.Tensor]:
    windows = [TOKENS[begin : begin + WINDOW] for begin in range(0, len(TOKENS), WINDOW)]
    with torch.inference_mode():
        return [model(torch.tensor([window])).logits[0, :-1].log_softmax(-1) for window in windows]


def test_perplexity_equals_transformers(checkpoint: tuple[Path, Any]) -> None:
    path, model = checkpoint
    shares: list[float] = []
    result = compare(predictor(path), None, TOKENS, WINDOW, shares.append)
    total = count = 0.0
    for index, rows in enumerate(expected_log_probabilities(model)):
        targets = torch.tensor(TOKENS[index * WINDOW + 1 : (index + 1) * WINDOW])
        total -= rows.gather(1, targets[:, None]).sum().item()
        count += len(targets)
    assert result.model.num_tokens == count
    assert result.model.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert result.reference is None
    assert shares[-1] == 1.0


def test_divergence_is_none_from_itself_and_some_from_a_rounded_model(checkpoint: tuple[Path, Any]) -> None:
    path, _ = checkpoint
    plain = predictor(path)
    same = compare(plain, predictor(path), TOKENS, WINDOW, lambda share: None)
    assert same.divergence == 0.0
    assert same.same_best == 1.0
    assert same.reference is not None
    assert same.reference.perplexity == same.model.perplexity
    eight = compare(predictor(path, "int8"), plain, TOKENS, WINDOW, lambda share: None)
    four = compare(predictor(path, "int4"), plain, TOKENS, WINDOW, lambda share: None)
    assert 0.0 < eight.divergence < 0.02
    assert eight.divergence < four.divergence < 1.0
    assert four.same_best <= eight.same_best <= 1.0


def test_what_cannot_be_compared_is_refused(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    plain = predictor(checkpoint[0])
    with pytest.raises(ValidationError, match="two tokens"):
        compare(plain, None, [3], WINDOW, lambda share: None)
    write_checkpoint(tmp_path, **{**SIZES, "vocab_size": 200})
    with pytest.raises(ValidationError, match="vocabularies"):
        compare(plain, predictor(tmp_path), TOKENS, WINDOW, lambda share: None)


def test_the_commands_end_to_end(
    checkpoint: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quantize, then measure what it lost."""
    path, _ = checkpoint
    text, output = tmp_path / "text.txt", tmp_path / "small.gguf"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    assert main(["quantize", str(path), str(output), "--to", "q8_0"]) == 0
    arguments = ["eval", "perplexity", str(output), "--text", str(text), "--reference", str(path)]
    assert main([*arguments, "--context", "64", "--max-tokens", "100", "--num-threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "reference" in printed
    assert "divergence 0.0" in printed
    assert main(["quantize", str(path), str(output), "--to", "q9"]) == 2
    assert "q8_0" in capsys.readouterr().err
    assert main(["eval", "perplexity", str(path), "--text", str(tmp_path / "none.txt")]) == 2
