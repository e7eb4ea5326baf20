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
from prompt_logprobs import SIZES, our_logprobs, their_logprobs


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("float")
    return path, write_checkpoint(path, tokenizer=True, **SIZES)


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
