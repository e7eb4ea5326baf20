"""Hugging Face formats: weights equal what a float64 reference makes of the stored integers and scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from penstock.base.errors import CheckpointError
from penstock.config.quantization import quantization_of
from penstock.kernels import ops as op_table
from penstock.loader import open_checkpoint
from penstock.quantization import CheckpointSource, hub_format

NAME = "model.layers.0.mlp.down_proj"
ROWS, COLUMNS = 96, 256
KERNELS = ["reference", "native"]


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns))


def random_scales(*shape: int, seed: int = 1) -> np.ndarray:
    """Exact in float16 and bfloat16 alike."""
    values = np.random.default_rng(seed).uniform(0.001, 0.02, shape).astype(np.float32)
    return torch.from_numpy(values).bfloat16().half().float().numpy().astype(np.float64)


def pack_stream(codes_KN: np.ndarray, bits: int) -> torch.Tensor:
    """Codes along the first dimension as a little-endian stream of bits, as int32 words."""
    stream = ((codes_KN[:, None, :] >> np.arange(bits)[None, :, None]) & 1).reshape(-1, codes_KN.shape[1])
    words = stream.reshape(-1, 32, codes_KN.shape[1]).astype(np.uint64)
    packed = (words << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1).astype(np.uint32)
    return torch.from_numpy(packed.view(np.int32).copy())


def load(
    path: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor], kernels: str, bias: bool = False
) -> Any:
    """The linear, the ops, and the format's count of its bytes."""
    save_file({f"{NAME}.{name}": tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    config = quantization_of({"quantization_config": settings})
    assert config is not None
    ops = op_table.load(kernels, 1)
    checkpoint = open_checkpoint(path)
    types = {name: checkpoint.tensor_type(name) for name in checkpoint.names()}
    chosen = hub_format(torch.float32, config, types)
    source = CheckpointSource(checkpoint, chosen.ignores, lambda fraction: None)
    weight = chosen.load_linear(source, [NAME], [ROWS], COLUMNS, ops)
    source.finish()
    assert chosen.linear_nbytes([NAME], [ROWS], COLUMNS, ops.layouts) == weight.packed.nbytes
    return weight, ops


def check(weight: Any, ops: Any, expected: np.ndarray, rtol: float = 1e-5) -> None:
    """The weight itself, and what it multiplies to where activations stay floats."""
    scale = np.abs(expected).max()
    if weight.input_order is None:
        np.testing.assert_allclose(ops.dequantize(weight.packed).double().numpy(), expected, rtol=0, atol=rtol * scale)
    if weight.packed.layout.activations == "float":
        product = weight.multiply(torch.eye(COLUMNS), None, torch.float32, ops).double().numpy()
        np.testing.assert_allclose(product, expected.T, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 32), (4, 128), (4, -1), (8, 64)])
def test_gptq(bits: int, group: int, version: str, kernels: str, tmp_path: Path) -> None:
    size = COLUMNS if group == -1 else group
    codes, scales = random_codes(ROWS, COLUMNS, bits), random_scales(ROWS, COLUMNS // size)
    stored_zeros = random_codes(ROWS, COLUMNS // size, bits, seed=2)
    zeros = (stored_zeros + (version == "gptq")) % (1 << bits)
    tensors = {
        "qweight": pack_stream(codes.T, bits),
        "qzeros": pack_stream(stored_zeros, bits).T,
        "scales": torch.from_numpy(scales.T).half(),
        "g_idx": torch.arange(COLUMNS, dtype=torch.int32) // size,
    }
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": version}
    expected = (codes - np.repeat(zeros, size, 1)) * np.repeat(scales, size, 1)
    check(*load(tmp_path, settings, tensors, kernels), expected)


@pytest.mark.parametrize("kernels", KERNELS)
def test_gptq_act_order(kernels: str, tmp_path: Path) -> None:
    codes, scales = random_codes(ROWS, COLUMNS, 4), random_scales(ROWS, COLUMNS // 64)
    groups = np.random.default_rng(3).permutation(np.arange(COLUMNS) // 64)
    tensors = {
        "qweight": pack_stream(codes.T, 4),
        "qzeros": pack_stream(np.full((ROWS, COLUMNS // 64), 7), 4).T,
        "scales": torch.from_numpy(scales.T).half(),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
    weight, ops = load(tmp_path, settings, tensors, kernels)
    assert weight.input_order is not None
    check(weight, ops, (codes - 8) * scales[:, groups])
    tensors["g_idx"][0] = 3
    with pytest.raises(CheckpointError, match="g_idx"):
        load(tmp_path, settings, tensors, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
def test_awq(kernels: str, tmp_path: Path) -> None:
    codes, scales = random_codes(ROWS, COLUMNS, 4), random_scales(ROWS, COLUMNS // 128)
    zeros = random_codes(ROWS, COLUMNS // 128, 4, seed=2)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(codes_KN: np.ndarray) -> torch.Tensor:
        columns = codes_KN.reshape(codes_KN.shape[0], -1, 8)[:, :, order].astype(np.uint64)
        words = (columns << (4 * np.arange(8, dtype=np.uint64))).sum(2).astype(np.uint32)
        return torch.from_numpy(words.view(np.int32).copy())

    tensors = {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": torch.from_numpy(scales.T).half()}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    expected = (codes - np.repeat(zeros, 128, 1)) * np.repeat(scales, 128, 1)
    check(*load(tmp_path, settings, tensors, kernels), expected)


FP8_SCALES = {"tensor": (), "one": (1,), "channel": (ROWS, 1), "vector": (ROWS,)}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("scheme", [*FP8_SCALES, "block"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8(dtype: torch.dtype, scheme: str, kernels: str, tmp_path: Path) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((ROWS, COLUMNS))).float().to(dtype)
    settings: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if scheme == "block":
        settings["weight_block_size"] = [64, 128]
        scales = random_scales(2, 2)
        spread = np.repeat(np.repeat(scales, 64, 0)[:ROWS], 128, 1)
        tensors = {"weight": weight, "weight_scale_inv": torch.from_numpy(scales).float()}
    else:
        scales = random_scales(*FP8_SCALES[scheme])
        spread = scales.reshape(-1, 1)
        tensors = {"weight": weight, "weight_scale": torch.from_numpy(np.asarray(scales)).float()}
        tensors["input_scale"] = torch.tensor(0.5)
    check(*load(tmp_path, settings, tensors, kernels), weight.double().numpy() * spread)


def compressed(
    kind: str, bits: int, strategy: str, group: int | None = None, activations: bool = False
) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, "symmetric": True}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True} if activations else None
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("activations", [True, False])
def test_compressed_tensors_int8(activations: bool, kernels: str, tmp_path: Path) -> None:
    codes, scales = random_codes(ROWS, COLUMNS, 8) - 128, random_scales(ROWS, 1)
    tensors = {
        "weight": torch.from_numpy(codes.astype(np.int8)),
        "weight_scale": torch.from_numpy(scales).bfloat16(),
    }
    weight, ops = load(tmp_path, compressed("int", 8, "channel", activations=activations), tensors, kernels)
    assert weight.packed.layout.activations == ("int8" if activations else "float")
    check(weight, ops, codes * scales)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", ["symmetric", "asymmetric", "act-order", "channel", "8 bits"])
def test_compressed_tensors_packed(variant: str, kernels: str, tmp_path: Path) -> None:
    bits = 8 if variant == "8 bits" else 4
    size = COLUMNS if variant == "channel" else 128
    codes, scales = random_codes(ROWS, COLUMNS, bits), random_scales(ROWS, COLUMNS // size)
    zeros = np.full((ROWS, COLUMNS // size), 1 << (bits - 1))
    groups = np.arange(COLUMNS) // size
    tensors = {
        "weight_packed": pack_stream(codes.T, bits).T,
        "weight_scale": torch.from_numpy(scales).half(),
        "weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    if variant == "asymmetric":
        zeros = random_codes(ROWS, COLUMNS // size, bits, seed=2)
        tensors["weight_zero_point"] = pack_stream(zeros, bits)
    if variant == "act-order":
        groups = np.random.default_rng(3).permutation(groups)
        tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    strategy = "channel" if variant == "channel" else "group"
    settings = compressed("int", bits, strategy, None if variant == "channel" else size)
    check(*load(tmp_path, settings, tensors, kernels), (codes - zeros[:, groups]) * scales[:, groups])


@pytest.mark.parametrize("kernels", KERNELS)
def test_compressed_tensors_fp8(kernels: str, tmp_path: Path) -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = random_scales(ROWS, 1)
    tensors = {"weight": weight, "weight_scale": torch.from_numpy(scales).bfloat16()}
    weights = load(tmp_path, compressed("float", 8, "channel", activations=True), tensors, kernels)
    check(*weights, weight.double().numpy() * scales)


@pytest.mark.parametrize("kernels", KERNELS)
def test_mxfp4(kernels: str, tmp_path: Path) -> None:
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = random_codes(ROWS, COLUMNS, 4)
    exponents = np.random.default_rng(1).integers(115, 130, (ROWS, COLUMNS // 32))
    tensors = {
        "weight_packed": torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)),
        "weight_scale": torch.from_numpy(exponents.astype(np.uint8)),
    }
    weight, ops = load(tmp_path, compressed("float", 4, "group", 32), tensors, kernels)
    check(weight, ops, values[codes] * np.repeat(2.0 ** (exponents - 127), 32, 1))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_nf4(nested: bool, kernels: str, tmp_path: Path) -> None:
    table = np.array(
        [
            -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
            0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
        ]
    )  # fmt: skip
    codes, blocks = random_codes(ROWS, COLUMNS, 4), ROWS * COLUMNS // 64
    packed = (codes.reshape(-1)[::2] << 4 | codes.reshape(-1)[1::2]).astype(np.uint8)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [ROWS, COLUMNS]}
    tensors = {"weight": torch.from_numpy(packed)[:, None], "weight.quant_map": torch.from_numpy(table).float()}
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03}
        second = np.random.default_rng(2).uniform(-1, 1, 256).astype(np.float32)
        indices, outer = random_codes(1, blocks, 8)[0], random_scales(-(-blocks // 256))
        scales = second[indices].astype(np.float64) * np.repeat(outer, 256)[:blocks] + 0.03
        tensors["weight.absmax"] = torch.from_numpy(indices.astype(np.uint8))
        tensors["weight.nested_absmax"] = torch.from_numpy(outer).float()
        tensors["weight.nested_quant_map"] = torch.from_numpy(second)
    else:
        scales = random_scales(blocks)
        tensors["weight.absmax"] = torch.from_numpy(scales).float()
    text = json.dumps(state).encode()
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    expected = table[codes] * np.repeat(scales.reshape(ROWS, -1), 64, 1)
    check(*load(tmp_path, settings, tensors, kernels), expected)


@pytest.mark.parametrize("kernels", KERNELS)
def test_bitsandbytes_int8(kernels: str, tmp_path: Path) -> None:
    codes, scales = random_codes(ROWS, COLUMNS, 8) - 128, random_scales(ROWS)
    tensors = {
        "weight": torch.from_numpy(codes.astype(np.int8)),
        "SCB": torch.from_numpy(scales).float(),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    check(*load(tmp_path, settings, tensors, kernels), codes * scales[:, None] / 127)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 128}, "bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 100}, "group_size"),
        ({"quant_method": "gptq", "bits": True}, "bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:layers": {}}}, "dynamic"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "gemv"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, 100]}, "weight_block_size"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": 3}}}, "config_groups"),
        ("gptq", "JSON object"),
    ],
)
def test_what_cannot_be_read_is_named(settings: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        quantization_of({"quantization_config": settings})
