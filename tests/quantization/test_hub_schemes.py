"""Whole quantised checkpoints through the public interface: the log-probabilities of a float32 model of transformers
that has the values the stored integers and scales stand for, and of transformers' own reader where it has one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from checkpoints import write_checkpoint
from hub_files import SCHEMES, write_hub
from penstock import LLM, SamplingParams

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "initializer_range": 0.05,
}
PROMPT = [5, 9, 200, 31, 7, 77, 120, 8, 33, 4]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("float")
    return path, write_checkpoint(path, tokenizer=True, **SIZES)


def our_logprobs(path: Path, dtype: str) -> list[float]:
    """Of each prompt token given those before it."""
    with LLM(str(path), dtype=dtype, max_model_len=64, max_memory=1 << 30) as llm:
        parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        [generation] = llm.generate([PROMPT], parameters)
    assert generation.prompt_logprobs is not None
    return [entry.token.logprob for entry in generation.prompt_logprobs if entry is not None]


@torch.inference_mode()
def their_logprobs(model: Any) -> list[float]:
    rows = model.eval()(torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    return [rows[position, token].item() for position, token in enumerate(PROMPT[1:])]


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_the_model_of_its_values(name: str, source: tuple[Path, Any], tmp_path: Path) -> None:
    """In float32 all but the last bits; in bfloat16, which takes other kernels, what that rounds."""
    path, model = source
    values = write_hub(path, tmp_path / "out", SCHEMES[name])
    model = copy.deepcopy(model)
    model.load_state_dict(values)
    expected = their_logprobs(model)
    # MXFP4 is multiplied with activations of 8 bits.
    assert our_logprobs(tmp_path / "out", "float32") == pytest.approx(expected, abs=0.05 if name == "MXFP4" else 1e-3)
    assert our_logprobs(tmp_path / "out", "bfloat16") == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("name", ["NF4", "NF4, nested", "LLM.int8"])
def test_bitsandbytes_as_transformers_reads_it(name: str, source: tuple[Path, Any], tmp_path: Path) -> None:
    """With its own library's kernels: those of 4 bits work in bfloat16, and LLM.int8's round activations to 8 bits."""
    write_hub(source[0], tmp_path / "out", SCHEMES[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    expected = their_logprobs(model)
    assert our_logprobs(tmp_path / "out", "float32") == pytest.approx(expected, abs=0.06)
