"""What `penstock quantize` writes is read by the gguf package and by transformers, and by us as the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints import write_checkpoint
from gguf_files import write_gguf
from penstock.base.errors import CheckpointError, ConfigError
from penstock.conversion import Calibration, Recipe, convert
from penstock.frontend.text_files import TextFiles
from penstock.frontend.tokenizer import Tokenizer
from penstock.kernels import ops as op_table
from penstock.kernels.packed import PackedLinear
from penstock.loader import read_model_config
from penstock.runner.loading import load_model
from whole_engine import build, engine_config, request, run

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "initializer_range": 0.05,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def quiet(_share: float) -> None:
    return


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    write_checkpoint(path, dtype="bfloat16", tokenizer=True, rope_parameters=LLAMA3_ROPE, **SIZES)
    return path


def greedy(path: Path, dtype: str = "bfloat16") -> list[list[int]]:
    core = build(engine_config(path, dtype=dtype))
    prompts = [[5, 9, 200, 31, 7], list(range(3, 90)), [42]]
    done = run(core, [request(str(index), prompt, 12) for index, prompt in enumerate(prompts)], 3)
    core.close()
    return [done[str(index)].token_ids for index in range(3)]


def test_float_targets_give_the_same_tokens(checkpoint: Path, tmp_path: Path) -> None:
    shares: list[float] = []
    convert(checkpoint, tmp_path / "m.gguf", "bf16", shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    # In float32: a GGUF holds this rope scaling as rounded divisors, and bfloat16 would turn their last bits into ties.
    assert greedy(tmp_path / "m.gguf", "float32") == greedy(checkpoint, "float32")


MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen2-moe": {"num_experts": 3, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "qwen3-moe": {"num_experts": 3, "moe_intermediate_size": 256},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_stand_where_the_gguf_package_has_them(family: str, tmp_path: Path) -> None:
    source, ours, theirs = tmp_path / "float", tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    write_checkpoint(source, family, dtype="bfloat16", tokenizer=True, **{**SIZES, **MIXTURES[family]})
    convert(source, ours, "q8_0", quiet)
    write_gguf(theirs, source, "Q8_0")
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(ours).tensors}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape.tolist() == expected[name].shape.tolist(), name
        assert tensor.tensor_type == expected[name].tensor_type, name
        np.testing.assert_array_equal(tensor.data, expected[name].data)
    greedy(ours)


@pytest.mark.parametrize(("family", "target"), [("mixtral", "w8a8"), ("qwen2-moe", "w4a16")])
def test_experts_are_written_as_integers_and_routers_are_not(family: str, target: str, tmp_path: Path) -> None:
    source, output = tmp_path / "float", tmp_path / "out"
    write_checkpoint(source, family, tokenizer=True, **{**SIZES, **MIXTURES[family]})
    convert(source, output, target, quiet)
    mlp = load_model(engine_config(output), op_table.load("native", 1), lambda fraction: None).layers[1].mlp
    assert isinstance(mlp.router.weight.packed, PackedLinear)
    weights = [weight.packed for weight in (*mlp.experts.gate_up, *mlp.experts.down)]
    assert {weight.layout.bits for weight in weights} == {8 if target == "w8a8" else 4}
    greedy(output)
    with pytest.raises(ConfigError, match="few tokens reach an expert"):
        convert(source, tmp_path / "two", "gptq", quiet, calibration=Calibration("Rivers. " * 100, 512))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", *MIXTURES])
def test_other_families_give_the_same_tokens(family: str, tmp_path: Path) -> None:
    sizes = {**SIZES, **MIXTURES.get(family, {})}
    write_checkpoint(tmp_path / "float", family, dtype="bfloat16", tokenizer=True, tie_word_embeddings=True, **sizes)
    convert(tmp_path / "float", tmp_path / "m.gguf", "bf16", quiet)
    assert greedy(tmp_path / "m.gguf") == greedy(tmp_path / "float")


@pytest.mark.parametrize(("target", "simple"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("q4_k_m", "Q4_K")])
def test_gguf_files_are_those_of_the_gguf_package(target: str, simple: str, checkpoint: Path, tmp_path: Path) -> None:
    """Names, shapes, order of rows and (for ggml's simple types) every byte, as the package's writer has them."""
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    convert(checkpoint, ours, target, quiet)
    write_gguf(theirs, checkpoint, "Q8_0" if simple == "Q8_0" else "Q4_0")
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    reader = gguf.GGUFReader(ours)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == expected.keys() | {"rope_freqs.weight"}
    float_file = tmp_path / "float.gguf"
    write_gguf(float_file, checkpoint, "F32")
    floats = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(float_file).tensors}
    for name, tensor in found.items():
        if name == "rope_freqs.weight":
            continue
        assert tensor.shape.tolist() == expected[name].shape.tolist()
        if tensor.tensor_type == expected[name].tensor_type:
            np.testing.assert_array_equal(tensor.data, expected[name].data)
        values = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        error = np.sqrt(np.square(values - floats[name]).mean() / np.square(floats[name]).mean())
        assert error < {"F32": 1e-9, "Q8_0": 0.01, "Q6_K": 0.025, "Q4_K": 0.09, "Q4_0": 0.11}[tensor.tensor_type.name]
    types = {found["blk.0.attn_q.weight"].tensor_type.name, found["blk.2.ffn_down.weight"].tensor_type.name}
    assert types == ({"Q4_K", "Q6_K"} if target == "q4_k_m" else {simple})
    assert reader.fields["general.architecture"].contents() == "llama"
    greedy(ours)


def test_text_survives(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "m.gguf", "q8_0", quiet)
    ours, theirs = TextFiles.read(tmp_path / "m.gguf"), TextFiles.read(checkpoint)
    assert ours.templates == theirs.templates
    assert ours.special_tokens == theirs.special_tokens
    assert set(theirs.eos_token_ids) <= set(ours.eos_token_ids)
    before, after = Tokenizer.from_files(theirs), Tokenizer.from_files(ours)
    for text in ("The quick brown fox", "<|im_start|>user\nhi<|im_end|>", "Ünïcode 水 🙂", "  1234  "):
        for special in (False, True):
            assert after.encode(text, add_special_tokens=special) == before.encode(text, add_special_tokens=special)
    assert read_model_config(tmp_path / "m.gguf").eos_token_ids


@pytest.mark.parametrize(("target", "act_order"), [("w8a8", False), ("w4a16", False), ("w4a16", True)])
def test_compressed_tensors_are_read_by_transformers(target: str, act_order: bool, tmp_path: Path) -> None:
    """The same logits: what transformers unpacks, in float32, against our reading of the same directory."""
    import transformers

    source, output = tmp_path / "float", tmp_path / "out"
    write_checkpoint(source, tokenizer=True, **SIZES)
    text = Calibration("Rivers, reservoirs and turbines. " * 40, 512) if act_order else None
    convert(source, output, target, quiet, Recipe(group_size=32 if act_order else 128, act_order=act_order), text)
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    prompt = [5, 9, 200, 31, 7, 77, 120, 8]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    core = build(engine_config(output))
    done = run(core, [request("0", prompt, 2, prompt_logprobs=1)], 1)["0"]
    core.close()
    given = [entry.logprob for entry in done.prompt_logprobs or []]
    wanted = [expected[position, token].item() for position, token in enumerate(prompt[1:])]
    # With int8 activations both round them, at places that a last bit of difference decides.
    assert given == pytest.approx(wanted, abs=0.15 if target == "w8a8" else 1e-3)
    stored = load_file(output / "model.safetensors")
    assert stored["model.embed_tokens.weight"].dtype == torch.float32


def test_an_interrupted_run_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole.gguf", tmp_path / "again.gguf"
    convert(checkpoint, whole, "q8_0", quiet)

    class StopError(Exception):
        pass

    def stop(share: float) -> None:
        if share > 0.5:
            raise StopError

    # The file's own name is among its metadata nowhere, so both are equal to the byte.
    with pytest.raises(StopError):
        convert(checkpoint, again, "q8_0", stop)
    assert not again.exists()
    left = (tmp_path / "again.gguf.part").stat().st_size
    assert left > 0
    shares: list[float] = []
    convert(checkpoint, again, "q8_0", shares.append)
    assert shares[0] > 0.3
    assert again.read_bytes() == whole.read_bytes()


def test_what_cannot_be_written_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gguf"):
        convert(checkpoint, tmp_path / "out", "q8_0", quiet)
    (tmp_path / "there.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match="already"):
        convert(checkpoint, tmp_path / "there.gguf", "q8_0", quiet)
    convert(checkpoint, tmp_path / "out", "w8a8", quiet)
    with pytest.raises(CheckpointError, match="quantised already"):
        convert(tmp_path / "out", tmp_path / "twice.gguf", "q8_0", quiet)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
