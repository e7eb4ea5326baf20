"""Whole models out of GGUF files that the gguf package wrote, against the safetensors they came from."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from driving import Driver, engine_config, make_runner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import write_checkpoint
from gguf_files import dequantized, write_gguf
from penstock.base.errors import CheckpointError, ConfigError
from penstock.frontend.text_files import TextFiles
from penstock.kernels import ops as op_table
from penstock.kernels.quantized import INT8_CHANNEL
from penstock.loader import GGUFFile, read_model_config
from penstock.runner.loading import load_model, weights_nbytes

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-tied": {"family": "llama", "tie_word_embeddings": True, "num_key_value_heads": 3},
    "llama-biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "head_dim": 18},
    "mixtral": {"family": "mixtral"},
    "qwen2-moe": {"family": "qwen2-moe"},
    "qwen3-moe": {"family": "qwen3-moe", "norm_topk_prob": True},  # which a file that does not say means
}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
}
PROMPTS = [[5, 9, 200, 31, 7], list(range(3, 120)), [42]]


def tokens_of(path: Path, **overrides: Any) -> list[list[int]]:
    runner = make_runner(path, **overrides)
    driver = Driver(runner)
    sequences = [driver.start(str(index), prompt) for index, prompt in enumerate(PROMPTS)]
    driver.generate(sequences, 24)
    assert all(sequence.error is None for sequence in sequences)
    return [sequence.output for sequence in sequences]


@pytest.mark.parametrize("family", FAMILIES)
def test_float_files_give_the_tokens_of_the_safetensors(family: str, tmp_path: Path) -> None:
    """F16 and BF16: the same numbers in another container, so the same tokens."""
    for kind, dtype in (("F16", "float16"), ("BF16", "bfloat16")):
        checkpoint, file = tmp_path / kind, tmp_path / f"{kind}.gguf"
        write_checkpoint(checkpoint, dtype=dtype, tokenizer=True, **{**SIZES, **FAMILIES[family]})
        write_gguf(file, checkpoint, kind)
        assert tokens_of(file, dtype="bfloat16") == tokens_of(checkpoint, dtype="bfloat16")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_blocks_mean_what_the_gguf_package_says(kind: str, tmp_path: Path) -> None:
    checkpoint, file = tmp_path / "safetensors", tmp_path / "model.gguf"
    write_checkpoint(checkpoint, tokenizer=True, tie_word_embeddings=True, **SIZES)
    write_gguf(file, checkpoint, kind)
    ops = op_table.load("reference", 1)
    config = engine_config(file, kernels="reference")
    model = load_model(config, ops, lambda fraction: None)
    expected = dequantized(checkpoint, kind)
    layer = "model.layers.1."
    qkv = torch.cat([expected[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(ops.dequantize(model.layers[1].attention.qkv.weight.packed), qkv)
    assert torch.equal(ops.dequantize(model.head.weight.packed), expected["model.embed_tokens.weight"])
    down = model.layers[1].mlp.down.weight.packed
    assert torch.equal(ops.dequantize(down), expected[f"{layer}mlp.down_proj.weight"])
    linears = [model.embedding]
    norms = [model.norm]
    for each in model.layers:
        linears += [each.attention.qkv, each.attention.output, each.mlp.gate_up, each.mlp.down]
        norms += [each.attention_norm, each.mlp_norm]
    held = sum(linear.weight.packed.nbytes for linear in linears) + sum(norm.weight_K.nbytes for norm in norms)
    assert weights_nbytes(config, ops) == held


def mixed(name: str) -> str:
    """As llama.cpp mixes: v and down in more bits than their neighbours."""
    return "Q8_0" if "attn_v" in name else "F16" if "ffn_down" in name else "Q5_0" if "token_embd" in name else "Q4_0"


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_mixed_files_run(kernels: str, tmp_path: Path) -> None:
    checkpoint, file = tmp_path / "safetensors", tmp_path / "model.gguf"
    write_checkpoint(checkpoint, tokenizer=True, **SIZES)
    write_gguf(file, checkpoint, mixed, split_max_tensors=7)
    [first, *_] = sorted(tmp_path.glob("*.gguf"))
    model = load_model(engine_config(first), op_table.load("reference", 1), lambda fraction: None)
    assert [part.num_rows for part in model.layers[0].attention.qkv.weight.parts] == [96 + 32, 32]
    assert tokens_of(first, kernels=kernels) == tokens_of(first, kernels="reference")


def test_types_without_a_kernel_are_widened_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, file = tmp_path / "safetensors", tmp_path / "model.gguf"
    write_checkpoint(
        checkpoint, tokenizer=True, **{**SIZES, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
    )
    blocks = np.random.default_rng(0).integers(0, 256, (256, 66), dtype=np.uint8)
    blocks[:, :2] = np.float16(0.01).reshape(1).view(np.uint8)

    def replace(writer: gguf.GGUFWriter) -> None:
        info = writer.tensors[0].pop("blk.0.ffn_up.weight")
        assert info is not None
        writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)

    write_gguf(file, checkpoint, "Q8_0", change=replace)
    ops = op_table.load("reference", 1)
    model = load_model(engine_config(file, kernels="reference"), ops, lambda fraction: None)
    assert "IQ2_XXS" in caplog.text
    parts = model.layers[0].mlp.gate_up.weight.parts
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.IQ2_XXS)
    up = ops.linear(torch.eye(256), parts[1].packed).T
    assert torch.equal(up, torch.from_numpy(expected))
    # It is in floats, so it can be rounded: within half a step of 255 for each row.
    rounding = engine_config(file, kernels="reference", quantization="int8")
    parts = load_model(rounding, ops, lambda fraction: None).layers[0].mlp.gate_up.weight.parts
    assert parts[1].packed.layout == INT8_CHANNEL
    steps = torch.from_numpy(expected).abs().amax(1, keepdim=True) / 127
    assert ((ops.dequantize(parts[1].packed) - torch.from_numpy(expected)).abs() <= 0.501 * steps).all()


def test_rope_factors_are_frequencies(tmp_path: Path) -> None:
    """Llama 3's scaling is written as a divisor for each pair: the same tokens as from config.json's parameters."""
    from penstock.layers.rotary import inverse_frequencies

    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    checkpoint, file = tmp_path / "safetensors", tmp_path / "model.gguf"
    write_checkpoint(checkpoint, tokenizer=True, rope_parameters=rope, **SIZES)
    config = read_model_config(checkpoint)
    scaled, _ = inverse_frequencies(config.rope, config.head_dim, 512, 512)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    factors = (plain / scaled).numpy().astype(np.float32)
    write_gguf(file, checkpoint, "F32", change=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    read = read_model_config(file)
    assert read.max_context_len == 512
    found, scale = inverse_frequencies(read.rope, read.head_dim, 512, 512)
    torch.testing.assert_close(found, scaled, rtol=1e-6, atol=0)
    assert scale == 1.0
    assert tokens_of(file) == tokens_of(checkpoint)


@pytest.mark.parametrize("key", ["llama.attention.head_count", "llama.block_count", "llama.context_length"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    checkpoint, file = tmp_path / "safetensors", tmp_path / "model.gguf"
    write_checkpoint(checkpoint, tokenizer=True, **SIZES)
    write_gguf(file, checkpoint, "F16", change=lambda writer: [pairs.pop(key, None) for pairs in writer.kv_data])
    with pytest.raises(CheckpointError, match=key):
        read_model_config(file)


def test_a_quantized_file_is_not_quantized_again(tmp_path: Path) -> None:
    checkpoint, file = tmp_path / "safetensors", tmp_path / "model.gguf"
    write_checkpoint(checkpoint, tokenizer=True, **SIZES)
    write_gguf(file, checkpoint, "Q8_0")
    with pytest.raises(ConfigError, match="no linear left in floats"):
        weights_nbytes(engine_config(file, quantization="int8"), op_table.load("reference", 1))


HOSTILE_VALUES: list[tuple[Any, gguf.GGUFValueType]] = [
    ("text", gguf.GGUFValueType.STRING),
    ("", gguf.GGUFValueType.STRING),
    (-1, gguf.GGUFValueType.INT32),
    (0, gguf.GGUFValueType.UINT32),
    (2**63 - 1, gguf.GGUFValueType.UINT64),
    (float("nan"), gguf.GGUFValueType.FLOAT32),
    (float("-inf"), gguf.GGUFValueType.FLOAT32),
    (True, gguf.GGUFValueType.BOOL),
    ([], gguf.GGUFValueType.ARRAY),
    ([3, 1], gguf.GGUFValueType.ARRAY),
    (["a", "b c", "\ud7ff"], gguf.GGUFValueType.ARRAY),
]


def test_every_key_may_lie(tmp_path: Path) -> None:
    """Any key with any value: a configuration and a tokenizer, or a CheckpointError."""
    whole = tmp_path / "whole.gguf"
    write_checkpoint(tmp_path / "safetensors", tokenizer=True, **SIZES)
    write_gguf(whole, tmp_path / "safetensors", "Q8_0")
    reader = gguf.GGUFReader(whole)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    extra = ("llama.expert_count", "llama.rope.scaling.type", "tokenizer.ggml.scores", "tokenizer.huggingface.json")
    path, refused = tmp_path / "lying.gguf", 0
    for lie in (*fields, *extra):
        for value, kind in HOSTILE_VALUES:
            writer = gguf.GGUFWriter(path, "llama")
            for name, field in fields.items():
                if name not in (lie, "general.architecture") and field.contents() != []:
                    item = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(name, field.contents(), field.types[0], sub_type=item)
            writer.kv_data[0].pop(lie, None)
            if value != []:  # the package cannot write an empty one
                writer.add_key_value(lie, value, kind)
            for tensor in reader.tensors:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            for read in (read_model_config, TextFiles.read):
                try:
                    read(path)
                except CheckpointError:
                    refused += 1
    assert refused > 100


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_headers_end_in_checkpoint_errors(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    """Whatever the metadata say: a configuration and a tokenizer, or a CheckpointError."""
    whole = tmp_path / "whole.gguf"
    if not whole.exists():
        write_checkpoint(tmp_path / "safetensors", tokenizer=True, **SIZES)
        write_gguf(whole, tmp_path / "safetensors", "Q8_0")
    data = bytearray(whole.read_bytes())
    header_bytes = min(entry.begin for entry in GGUFFile(whole).tensors.values())
    for place, value in changes:
        data[place % header_bytes] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    for read in (read_model_config, TextFiles.read):
        with contextlib.suppress(CheckpointError):
            read(path)
