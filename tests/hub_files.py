"""Quantised Hugging Face checkpoints, rounded to nearest by code that is not ours (or none of Penstock's): for each
scheme the stored tensors, and the values that the stored integers and scales stand for, in float64.

bitsandbytes' come from bitsandbytes itself; GPTQ's, AWQ's, FP8's and MXFP4's are packed here by their definitions.

Shapes: N outputs, K inputs, G groups.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes
import numpy as np
import torch
from safetensors.torch import load_file, save_file

NF4_TABLE = np.array(
    [
        -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ]
)  # fmt: skip
FP4_TABLE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Stored = tuple[dict[str, torch.Tensor], np.ndarray]


class Scheme(NamedTuple):
    """store: float64 [N, K] -> the tensors by suffix, and the values. settings: the quantization_config."""

    store: Callable[[np.ndarray], Stored]
    settings: dict[str, Any]


def write_hub(source: Path, output: Path, scheme: Scheme) -> dict[str, torch.Tensor]:
    """Writes a float checkpoint's linears in a scheme; returns the state dict that it stands for, float32."""
    output.mkdir()
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name], values[name] = tensor, tensor.float()
            continue
        parts, numbers = scheme.store(tensor.double().numpy())
        stored |= {f"{name.removesuffix('.weight')}.{suffix}": part.contiguous() for suffix, part in parts.items()}
        values[name] = torch.from_numpy(numbers).float()
    save_file(stored, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, "quantization_config": scheme.settings}))
    for file in source.glob("tokenizer*"):
        shutil.copyfile(file, output / file.name)
    return values


def pack_stream(codes_KN: np.ndarray, bits: int) -> torch.Tensor:
    """Codes along the first dimension as a little-endian stream of bits, as int32 words."""
    stream = ((codes_KN[:, None, :] >> np.arange(bits)[None, :, None]) & 1).reshape(-1, codes_KN.shape[1])
    words = stream.reshape(-1, 32, codes_KN.shape[1]).astype(np.uint64)
    packed = (words << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1).astype(np.uint32)
    return torch.from_numpy(packed.view(np.int32).copy())


def pack_awq(codes_KN: np.ndarray) -> torch.Tensor:
    """Eight outputs a word, in AWQ's order."""
    columns = codes_KN.reshape(codes_KN.shape[0], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].astype(np.uint64)
    words = (columns << (4 * np.arange(8, dtype=np.uint64))).sum(2).astype(np.uint32)
    return torch.from_numpy(words.view(np.int32).copy())


def _asymmetric(weight_NK: np.ndarray, bits: int, size: int, groups_K: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes [N, K], float16 scales and zero points of 1 and up [N, G], and the values; groups_K: of each input."""
    top, count = (1 << bits) - 1, weight_NK.shape[0]
    order = np.argsort(groups_K, kind="stable")
    grouped = weight_NK[:, order].reshape(count, -1, size)
    low, high = np.minimum(grouped.min(2), 0), np.maximum(grouped.max(2), 0)
    scales = np.maximum((high - low) / top, 1e-4).astype(np.float16).astype(np.float64)
    zeros = np.clip(np.round(-low / scales), 1, top).astype(np.int64)
    codes = np.clip(np.round(weight_NK / scales[:, groups_K]) + zeros[:, groups_K], 0, top).astype(np.int64)
    return codes, scales, zeros, (codes - zeros[:, groups_K]) * scales[:, groups_K]


def gptq(bits: int, size: int = 64, act_order: bool = False) -> Scheme:
    def store(weight_NK: np.ndarray) -> Stored:
        groups_K = np.arange(weight_NK.shape[1]) // size
        if act_order:
            groups_K = np.random.default_rng(weight_NK.shape[1]).permutation(groups_K)
        codes, scales, zeros, values = _asymmetric(weight_NK, bits, size, groups_K)
        return {
            "qweight": pack_stream(codes.T, bits),
            "qzeros": pack_stream(zeros - 1, bits).T,
            "scales": torch.from_numpy(scales.T).half(),
            "g_idx": torch.from_numpy(groups_K.astype(np.int32)),
        }, values

    return Scheme(
        store, {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": act_order, "sym": False}
    )


def awq(size: int = 64) -> Scheme:
    def store(weight_NK: np.ndarray) -> Stored:
        codes, scales, zeros, values = _asymmetric(weight_NK, 4, size, np.arange(weight_NK.shape[1]) // size)
        tensors = {
            "qweight": pack_awq(codes.T),
            "qzeros": pack_awq(zeros.T),
            "scales": torch.from_numpy(scales.T).half(),
        }
        return tensors, values

    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    return Scheme(store, settings)


def fp8(kind: str) -> Scheme:
    """kind: "tensor", "channel" or "block" (of 64 x 64)."""

    def store(weight_NK: np.ndarray) -> Stored:
        count, columns = weight_NK.shape
        shape = {"tensor": (1, 1, count, columns), "channel": (count, 1, 1, columns)}.get(
            kind, (count // 64, columns // 64, 64, 64)
        )
        blocks = weight_NK.reshape(shape[0], shape[2], shape[1], shape[3])
        scales = torch.from_numpy(np.abs(blocks).max((1, 3), keepdims=True) / 448).float()
        codes = (torch.from_numpy(blocks) / scales.double()).float().to(torch.float8_e4m3fn)
        values = (codes.double() * scales.double()).numpy().reshape(count, columns)
        stored = {"tensor": scales.flatten()[0], "channel": scales.flatten()[:, None]}.get(kind, scales[:, 0, :, 0])
        suffix = "weight_scale_inv" if kind == "block" else "weight_scale"
        return {"weight": codes.view(count, columns), suffix: stored}, values

    settings: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    return Scheme(store, {**settings, "weight_block_size": [64, 64]} if kind == "block" else settings)


def mxfp4() -> Scheme:
    """As compressed-tensors stores it: the scale is a power of two that lets the largest of 32 be at most 6."""

    def store(weight_NK: np.ndarray) -> Stored:
        count, columns = weight_NK.shape
        grouped = weight_NK.reshape(count, -1, 32)
        exponents = np.floor(np.log2(np.maximum(np.abs(grouped).max(2), 1e-30))) - 2
        scales = np.exp2(exponents)[:, :, None]
        codes = np.abs(np.clip(grouped / scales, -6, 6)[..., None] - FP4_TABLE).argmin(3)
        flat = codes.reshape(count, columns)
        packed = (flat[:, ::2] | flat[:, 1::2] << 4).astype(np.uint8)
        tensors = {
            "weight_packed": torch.from_numpy(packed),
            "weight_scale": torch.from_numpy((exponents + 127).astype(np.uint8)),
        }
        return tensors, (FP4_TABLE[codes] * scales).reshape(count, columns)

    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    settings = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": groups}
    return Scheme(store, {**settings, "ignore": ["lm_head"]})


def nf4(nested: bool) -> Scheme:
    def store(weight_NK: np.ndarray) -> Stored:
        quantised, state = bitsandbytes.functional.quantize_4bit(
            torch.from_numpy(weight_NK).float(), blocksize=64, compress_statistics=nested, quant_type="nf4"
        )
        tensors = {f"weight.{name}": value.clone() for name, value in state.as_dict(packed=True).items()}
        values = bitsandbytes.functional.dequantize_4bit(quantised, state).double().numpy()
        return {"weight": quantised, **tensors}, values

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return Scheme(store, {**settings, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_use_double_quant": nested})


def llm_int8() -> Scheme:
    def store(weight_NK: np.ndarray) -> Stored:
        codes, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(torch.from_numpy(weight_NK).half())
        tensors = {"weight": codes, "SCB": largest.float(), "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return tensors, codes.double().numpy() * largest.double().numpy()[:, None] / 127

    return Scheme(store, {"quant_method": "bitsandbytes", "load_in_8bit": True})


SCHEMES: dict[str, Scheme] = {
    **{f"GPTQ {bits} bit": gptq(bits) for bits in (2, 3, 4, 8)},
    "GPTQ 4 bit, act-order": gptq(4, act_order=True),
    "AWQ": awq(),
    "FP8 a tensor": fp8("tensor"),
    "FP8 a channel": fp8("channel"),
    "FP8 a block": fp8("block"),
    "MXFP4": mxfp4(),
    "NF4": nf4(nested=False),
    "NF4, nested": nf4(nested=True),
    "LLM.int8": llm_int8(),
}
