"""Calibrated conversion: better than rounding to nearest, read by others, and continued where it was stopped."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compressed_tensors.compressors.pack_quantized
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tools.bundled_model import corpus

from checkpoints import write_checkpoint
from hub_files import pack_awq, pack_stream
from penstock.assets import BUNDLED_MODEL
from penstock.base.errors import CheckpointError, ConfigError
from penstock.config.defaults import machine_facts
from penstock.config.resolve import EngineOptions, resolve_engine_config
from penstock.conversion import Calibration, Recipe, convert
from penstock.conversion.gptq_search import gptq
from penstock.conversion.group_codes import Grid, nearest
from penstock.conversion.recipe import tensors_of
from penstock.frontend.tokenizer import Tokenizer
from penstock.llm.perplexity import Comparison, Predictor, compare
from penstock.loader import read_model_config

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.05, "max_position_embeddings": 128,
}  # fmt: skip
TEXT = Calibration("The quick brown fox sings of rivers, reservoirs and turbines to the lazy dog. " * 40, 1024)


def quiet(_share: float) -> None:
    return


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    write_checkpoint(path, "qwen2", dtype="bfloat16", tokenizer=True, **SIZES)
    return path


@pytest.fixture(scope="module")
def world() -> Calibration:
    """What the bundled model was made for, in conversations that it was not trained on."""
    conversations = itertools.islice(corpus.training(9, 10**6), 120)
    return Calibration("".join(conversation.text() for conversation in conversations), 6144)


def predictor(path: Path) -> Predictor:
    options = EngineOptions(max_model_len=512, num_threads=1)
    return Predictor(resolve_engine_config(str(path), read_model_config(path), options, machine_facts()), quiet)


@pytest.fixture(scope="module")
def score() -> Callable[[Path], Comparison]:
    """Against the float model, on held-out text of the world."""
    plain = predictor(BUNDLED_MODEL)
    held_out = corpus.held_out(0, 2)
    text = "".join(conversation.text() for conversation in held_out)
    tokens = Tokenizer.load(BUNDLED_MODEL).encode(text, add_special_tokens=False)[:2560]
    return lambda path: compare(predictor(path), plain, tokens, 512, quiet)


# How much of the divergence of rounding to nearest may be left.
@pytest.mark.parametrize(("target", "most"), [("w4a16", 0.75), ("q3_k_m", 0.95)])
def test_calibration_beats_rounding(
    target: str, most: float, world: Calibration, score: Callable[[Path], Comparison], tmp_path: Path
) -> None:
    suffix = "" if target == "w4a16" else ".gguf"
    rounded, calibrated = tmp_path / f"rounded{suffix}", tmp_path / f"calibrated{suffix}"
    convert(BUNDLED_MODEL, rounded, target, quiet)
    convert(BUNDLED_MODEL, calibrated, target, quiet, Recipe(), world)
    assert score(calibrated).divergence < most * score(rounded).divergence
    assert not list(tmp_path.glob("*.calibration"))


def random_problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [64, 256], and inputs [512, 256] that are correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(512, 48, generator=generator) @ torch.randn(48, 256, generator=generator)
    inputs = (shared + torch.randn(512, 256, generator=generator)) * torch.logspace(-1, 0.5, 256)
    return torch.randn(64, 256, generator=generator) * 0.1, inputs


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group_size", "is_symmetric"), [(2, 32, False), (4, 64, True), (8, 0, True)])
def test_gptq_loses_less_of_the_output(bits: int, group_size: int, is_symmetric: bool, act_order: bool) -> None:
    weight, inputs = random_problem()
    grid = Grid(bits, group_size, is_symmetric)
    found = gptq(weight, inputs.T @ inputs, grid, act_order)
    plain = nearest(weight, grid)
    errors = [(inputs @ (codes.values() - weight).T).square().mean().item() for codes in (found, plain)]
    assert errors[0] < 0.7 * errors[1]
    width = group_size or 256
    assert torch.equal(found.groups, torch.arange(256, dtype=torch.int32) // width)


def test_gptq_is_the_definition_without_correlation() -> None:
    """Uncorrelated inputs leave no error to make up for: GPTQ is rounding to nearest."""
    weight, _ = random_problem()
    grid = Grid(4, 64, is_symmetric=True)
    found = gptq(weight, torch.eye(256), grid, act_order=False)
    assert torch.equal(found.codes, nearest(weight, grid).codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_words_are_the_formats(bits: int) -> None:
    weight, _ = random_problem()
    recipe = Recipe(bits, 64)
    found = nearest(weight, Grid(bits, 64, is_symmetric=bits >= 4))
    tensors = tensors_of("gptq", recipe, "x", found)
    assert torch.equal(tensors["x.qweight"], pack_stream(found.codes.T.numpy().astype(np.int64), bits))
    assert torch.equal(tensors["x.qzeros"], pack_stream(found.zeros.numpy().astype(np.int64) - 1, bits).T)
    assert tensors["x.scales"].T.float().equal(found.scales)


def test_awq_words_are_the_formats() -> None:
    weight, _ = random_problem()
    found = nearest(weight, Grid(4, 64, is_symmetric=False))
    tensors = tensors_of("awq", Recipe(4, 64), "x", found)
    assert torch.equal(tensors["x.qweight"], pack_awq(found.codes.T.numpy()))
    assert torch.equal(tensors["x.qzeros"], pack_awq(found.zeros.T.numpy()))


def test_packed_words_are_those_of_compressed_tensors() -> None:
    """By its own unpacking."""
    weight, _ = random_problem()
    found = nearest(weight, Grid(4, 64, is_symmetric=True))
    packed = tensors_of("w4a16", Recipe(4, 64), "x", found)["x.weight_packed"]
    unpack = compressed_tensors.compressors.pack_quantized.unpack_from_int32
    assert torch.equal(unpack(packed, 4, found.codes.shape).int() + 8, found.codes.int())


TARGETS = {
    "gptq": ("gptq", Recipe(4, 32, act_order=True)),
    "gptq 3": ("gptq", Recipe(3, 64)),
    "awq": ("awq", Recipe(4, 32)),
    "w4a16": ("w4a16", Recipe(4, 64, act_order=True)),
    "q4_k_m": ("q2_k", Recipe()),
}


@pytest.mark.parametrize("case", TARGETS)
def test_a_killed_run_goes_on(case: str, checkpoint: Path, tmp_path: Path) -> None:
    """Stopped again and again, while calibrating and while writing, it ends with the same bytes."""
    target, recipe = TARGETS[case]
    suffix = ".gguf" if target == "q2_k" else ""
    whole, again = tmp_path / f"whole{suffix}", tmp_path / f"again{suffix}"
    shares: list[float] = []
    convert(checkpoint, whole, target, shares.append, recipe, TEXT)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)

    class KilledError(Exception):
        pass

    for limit in (0.2, 0.5, 0.92, 2.0):

        def stop(share: float, limit: float = limit) -> None:
            if share > limit:
                raise KilledError

        if limit < 1:
            with pytest.raises(KilledError):
                convert(checkpoint, again, target, stop, recipe, TEXT)
            assert (tmp_path / f"again{suffix}.calibration").is_dir()
        else:
            convert(checkpoint, again, target, stop, recipe, TEXT)
    name = Path() if suffix else Path("model.safetensors")
    assert (again / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == [again.name, whole.name]


def test_a_journal_of_another_run_is_not_taken(checkpoint: Path, tmp_path: Path) -> None:
    def stop(share: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        convert(checkpoint, tmp_path / "out", "gptq", stop, Recipe(4, 32), TEXT)
    with pytest.raises(ConfigError, match="another model, text or options"):
        convert(checkpoint, tmp_path / "out", "gptq", quiet, Recipe(4, 64), TEXT)
    shutil.rmtree(tmp_path / "out.calibration")
    convert(checkpoint, tmp_path / "out", "gptq", quiet, Recipe(4, 64), TEXT)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == ("gptq", 4, 64)


def test_awq_divides_its_scales_out_again(tmp_path: Path) -> None:
    """Scales that go into the norm are divided out again: what is stored stands for the weights that were."""
    write_checkpoint(tmp_path / "float", tokenizer=True, **SIZES)
    convert(tmp_path / "float", tmp_path / "out", "awq", quiet, Recipe(4, 32), TEXT)
    before, after = load_file(tmp_path / "float/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    scales_K = before[norm] / after[norm]
    assert scales_K.max() > 1.05 * scales_K.min()
    name = "model.layers.0.self_attn.q_proj"
    codes = [after[f"{name}.{part}"] for part in ("qweight", "qzeros")]
    nibbles = [
        torch.stack([(words >> (4 * place)) & 15 for place in (0, 4, 1, 5, 2, 6, 3, 7)], 2).flatten(1)
        for words in codes
    ]
    spread = [part.float().repeat_interleave(32, 0) for part in (nibbles[1], after[f"{name}.scales"])]
    weight = ((nibbles[0] - spread[0]) * spread[1]).T / scales_K
    expected = before[f"{name}.weight"]
    assert (weight - expected).square().mean().sqrt() < 0.12 * expected.square().mean().sqrt()


@pytest.mark.parametrize(
    ("target", "recipe", "calibration", "named"),
    [
        ("gptq", Recipe(), None, "text to calibrate"),
        ("gptq", Recipe(5), TEXT, "bits"),
        ("w4a16", Recipe(3), TEXT, "bits"),
        ("awq", Recipe(4, 100), TEXT, "group-size"),
        ("awq", Recipe(4, 32, act_order=True), TEXT, "act-order"),
        ("q8_0", Recipe(), TEXT, "too little"),
        ("gptq", Recipe(4, 32), Calibration("too short"), "tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(
    target: str, recipe: Recipe, calibration: Calibration | None, named: str, checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / ("out.gguf" if target == "q8_0" else "out")
    with pytest.raises(ConfigError, match=named):
        convert(checkpoint, output, target, quiet, recipe, calibration)
    assert not list(tmp_path.iterdir())


def test_shapes_that_a_format_cannot_hold_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="256 x 128: outputs must be"):
        convert(checkpoint, tmp_path / "out", "gptq", quiet, Recipe(4, 256), TEXT)
