"""Quantised checkpoints rounded further on demand: what their files left in floats, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import Driver, engine_config, make_runner
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint
from gguf_files import write_gguf
from hub_files import SCHEMES, write_hub
from penstock.base.errors import ConfigError
from penstock.cli.compile import copy_text_files
from penstock.kernels import ops as op_table
from penstock.kernels.quantized import INT8_CHANNEL, w4a16, with_int8_activations
from penstock.runner.loading import load_model, weights_nbytes, write_package

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 16, "num_hidden_layers": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
}  # fmt: skip
EXCEPTED = "model.layers.1.self_attn.k_proj"
PROMPTS = [[5, 9, 200, 31, 7], list(range(3, 90)), [42]]


def write_quantized(path: Path, scheme: str, family: str = "llama", **overrides: Any) -> Path:
    """A checkpoint at `path` whose linears are stored in a scheme, but for EXCEPTED and the head."""
    source = path.with_name(f"{path.name}-floats")
    write_checkpoint(source, family, **{**SIZES, **overrides})
    write_hub(source, path, SCHEMES[scheme])
    stored, floats = load_file(path / "model.safetensors"), load_file(source / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(f"{EXCEPTED}.")}
    excepted = {name: tensor for name, tensor in floats.items() if name.startswith(f"{EXCEPTED}.")}
    save_file(kept | excepted, path / "model.safetensors", metadata={"format": "pt"})
    return path


def loaded(path: Path, **options: Any) -> Any:
    """The model, whose weights take what was counted."""
    config, ops = engine_config(path, **options), op_table.load("native", 1)
    model = load_model(config, ops, lambda fraction: None)
    assert weights_nbytes(config, ops) < weights_nbytes(engine_config(path), ops)
    return model, ops


def tokens_of(path: Path, chunk: int | None, together: bool, **options: Any) -> list[list[int]]:
    driver = Driver(make_runner(path, dtype="bfloat16", **options))
    sequences = [driver.start(str(index), prompt) for index, prompt in enumerate(PROMPTS)]
    for group in [sequences] if together else [[sequence] for sequence in sequences]:
        driver.generate(group, 12, chunk)
    assert all(sequence.error is None for sequence in sequences)
    return [sequence.output for sequence in sequences]


@pytest.mark.parametrize("scheme", ["GPTQ 4 bit, act-order", "AWQ", "FP8 a channel", "NF4", "LLM.int8"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_head_and_excepted_linears_are_rounded(scheme: str, is_tied: bool, tmp_path: Path) -> None:
    path = write_quantized(tmp_path / "stored", scheme, tie_word_embeddings=is_tied)
    (model, ops), (plain, _) = loaded(path, quantization="int8"), (load_plain(path), None)
    floats = load_file(path / "model.safetensors")
    assert model.head.weight.packed.layout == INT8_CHANNEL
    expected = floats["model.embed_tokens.weight" if is_tied else "lm_head.weight"].float()
    assert (ops.dequantize(model.head.weight.packed) - expected).abs().max() <= expected.abs().max() / 127
    assert type(model.embedding.weight.packed).__name__ == ("QuantizedLinear" if is_tied else "PackedLinear")
    parts = model.layers[1].attention.qkv.weight.parts
    assert parts[1].packed.layout == INT8_CHANNEL
    expected = floats[f"{EXCEPTED}.weight"].float()
    assert (ops.dequantize(parts[1].packed) - expected).abs().max() <= expected.abs().max() / 127
    for ours, theirs in zip(parts[::2], plain.layers[1].attention.qkv.weight.parts[::2], strict=True):
        assert torch.equal(ours.packed.steps(), theirs.packed.steps()), "stored weights stay as they are"
    for part in ("gate_up", "down"):
        ours, theirs = (getattr(each.layers[0].mlp, part).weight for each in (model, plain))
        assert ours.packed.layout == theirs.packed.layout
        assert torch.equal(ours.packed.steps(), theirs.packed.steps())


def load_plain(path: Path) -> Any:
    return load_model(engine_config(path), op_table.load("native", 1), lambda fraction: None)


@pytest.mark.parametrize("kind", ["int8", "int4", "q4_k_m", "fp8"])
def test_a_rounded_head_generates(kind: str, tmp_path: Path) -> None:
    """Alone and together, in one piece and in chunks: the same tokens."""
    path = write_quantized(tmp_path / "stored", "GPTQ 4 bit, act-order", hidden_size=256)
    results = [
        tokens_of(path, chunk, together, quantization=kind)
        for chunk, together in ((None, True), (16, True), (None, False))
    ]
    assert results[0] == results[1] == results[2]


def test_routers_stay_floats(tmp_path: Path) -> None:
    path = write_quantized(tmp_path / "stored", "AWQ", "qwen2-moe", hidden_size=128)
    model, _ = loaded(path, quantization="int8")
    mlp = model.layers[0].mlp
    assert {type(each.weight.packed).__name__ for each in (mlp.router, mlp.shared.router)} == {"PackedLinear"}
    assert mlp.experts.down[0].packed.layout == w4a16(64, "f16", "point")
    assert model.head.weight.packed.layout == INT8_CHANNEL


def test_floats_of_a_gguf_are_rounded(tmp_path: Path) -> None:
    checkpoint, file = tmp_path / "floats", tmp_path / "model.gguf"
    write_checkpoint(checkpoint, tokenizer=True, **SIZES)
    write_gguf(file, checkpoint, lambda name: "F16" if name.startswith("output.") else "Q4_0")
    model, _ = loaded(file, quantization="int8")
    assert model.head.weight.packed.layout == INT8_CHANNEL
    assert model.layers[0].mlp.down.weight.packed.layout.bits == 4


def test_floats_that_a_config_calls_quantized_are_rounded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **SIZES)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = loaded(tmp_path, quantization="int8")
    assert model.layers[0].mlp.down.weight.packed.layout == INT8_CHANNEL


def logits_of(path: Path, prompt: list[int], **options: Any) -> torch.Tensor:
    """Log-probabilities of the prompt's tokens but the first."""
    driver = Driver(make_runner(path, **options))
    sequence = driver.start("one", prompt, prompt_logprobs=1)
    driver.generate([sequence], 1)
    return torch.tensor([entry.logprob for entry in sequence.prompt_logprobs])


INTEGER_SCHEMES = ["GPTQ 4 bit, act-order", "GPTQ 3 bit", "GPTQ 8 bit", "AWQ", "LLM.int8"]


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("scheme", INTEGER_SCHEMES)
def test_rounded_activations_stay_close_to_the_stored_weights(scheme: str, kernels: str, tmp_path: Path) -> None:
    """To transformers' logits on the weights that are stored, in float32: one input of 127 is lost at most."""
    model = write_checkpoint(tmp_path / "floats", attention_bias=True, **{**SIZES, "initializer_range": 0.05})
    model.load_state_dict(write_hub(tmp_path / "floats", tmp_path / "stored", SCHEMES[scheme]))
    prompt = PROMPTS[1]
    with torch.inference_mode():
        rows = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = torch.tensor([rows[position, token] for position, token in enumerate(prompt[1:])])
    exact = logits_of(tmp_path / "stored", prompt, kernels=kernels)
    assert (exact - expected).abs().max() < 1e-3
    rounded = logits_of(tmp_path / "stored", prompt, kernels=kernels, activations="int8")
    assert 1e-5 < (rounded - expected).abs().mean() < 0.01
    assert (rounded - expected).abs().max() < 0.05


@pytest.mark.parametrize("scheme", INTEGER_SCHEMES)
def test_rounded_activations_of_one_do_not_depend_on_others(scheme: str, tmp_path: Path) -> None:
    """Alone and together, in one piece and in chunks: the same tokens."""
    path = write_quantized(tmp_path / "stored", scheme)
    options = {"activations": "int8", "quantization": "int8"}
    results = [
        tokens_of(path, chunk, together, **options) for chunk, together in ((None, True), (16, True), (None, False))
    ]
    assert results[0] == results[1] == results[2]


def test_experts_take_rounded_activations(tmp_path: Path) -> None:
    path = write_quantized(tmp_path / "stored", "AWQ", "qwen2-moe")
    config, ops = engine_config(path, activations="int8"), op_table.load("native", 1)
    held: dict[str, int] = {}
    model = load_model(config, ops, lambda fraction: None, lambda _seconds, found: held.update(found))
    mlp = model.layers[0].mlp
    assert mlp.experts.down[0].packed.layout == with_int8_activations(w4a16(64, "f16", "point"))
    assert type(mlp.router.weight.packed).__name__ == "PackedLinear"
    assert sum(held.values()) <= weights_nbytes(config, ops)
    assert set(held) == {"int4, inputs in int8", "float32"}
    x = torch.randn(9, SIZES["hidden_size"])
    exact = load_plain(path).layers[0].mlp(x, ops)
    assert 0 < (mlp(x, ops) - exact).square().mean() < 1e-3 * exact.square().mean()


@pytest.mark.parametrize("scheme", ["FP8 a channel", "NF4"])
def test_activations_of_weights_that_are_no_integers_are_not_rounded(scheme: str, tmp_path: Path) -> None:
    path, ops = write_quantized(tmp_path / "stored", scheme), op_table.load("reference", 1)
    for model in (path, tmp_path / "stored-floats"):
        with pytest.raises(ConfigError, match="could round no inputs") as refused:
            weights_nbytes(engine_config(model, activations="int8"), ops)
        assert refused.value.param == "activations"
    weights_nbytes(engine_config(tmp_path / "stored-floats", activations="int8", quantization="int4"), ops)


def test_a_gguf_rounds_them_anyway(tmp_path: Path) -> None:
    checkpoint, file = tmp_path / "floats", tmp_path / "model.gguf"
    write_checkpoint(checkpoint, tokenizer=True, **SIZES)
    write_gguf(file, checkpoint, "Q4_0")
    asked, plain = (tokens_of(file, None, True, **options) for options in ({"activations": "int8"}, {}))
    assert asked == plain


def test_a_package_holds_what_was_asked_for(tmp_path: Path) -> None:
    path, package = write_quantized(tmp_path / "stored", "GPTQ 4 bit, act-order"), tmp_path / "package"
    options = {"activations": "int8", "quantization": "int8"}
    package.mkdir()
    write_package(
        engine_config(path, dtype="bfloat16", **options), op_table.load("native", 1), package, lambda fraction: None
    )
    copy_text_files(path, package)
    assert tokens_of(package, None, True) == tokens_of(path, None, True, **options)
    assert tokens_of(package, None, True, **options) == tokens_of(path, None, True, **options)
    plain = tmp_path / "plain"
    plain.mkdir()
    write_package(engine_config(path, dtype="bfloat16"), op_table.load("native", 1), plain, lambda fraction: None)
    copy_text_files(path, plain)
    with pytest.raises(ConfigError, match="compiled with activations not set"):
        make_runner(plain, dtype="bfloat16", activations="int8")
