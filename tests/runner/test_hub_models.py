"""Whole models in Hugging Face's quantised formats: the logits of transformers on the weights that are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint
from whole_engine import build, engine_config, request, run

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "initializer_range": 0.05,
    "attention_bias": True,
}
PROMPT = [5, 9, 200, 31, 7, 77, 120, 8, 33, 4]
GROUP = 64
Stored = tuple[dict[str, torch.Tensor], np.ndarray]


def words(codes_KN: np.ndarray, bits: int = 4) -> torch.Tensor:
    """Codes along the first dimension, `32 / bits` to an int32, the first lowest."""
    groups = codes_KN.reshape(-1, 32 // bits, codes_KN.shape[1]).astype(np.uint64)
    packed = (groups << (bits * np.arange(32 // bits, dtype=np.uint64))[None, :, None]).sum(1).astype(np.uint32)
    return torch.from_numpy(packed.view(np.int32).copy())


def rounded(weight: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of 4 bits with a scale and a zero point for each group of columns."""
    count = groups.max() + 1
    low = np.stack([weight[:, groups == g].min(1) for g in range(count)], 1)
    high = np.stack([weight[:, groups == g].max(1) for g in range(count)], 1)
    scales = ((high - low) / 15).astype(np.float16).astype(np.float64)
    zeros = np.clip(np.round(-low / scales), 1, 15)
    codes = np.clip(np.round(weight / scales[:, groups]) + zeros[:, groups], 0, 15)
    return codes.astype(int), scales, zeros.astype(int)


def gptq(weight: np.ndarray, seed: int) -> Stored:
    groups = np.random.default_rng(seed).permutation(np.arange(weight.shape[1]) // GROUP)  # act-order
    codes, scales, zeros = rounded(weight, groups)
    tensors = {
        "qweight": words(codes.T),
        "qzeros": words(zeros - 1).T,
        "scales": torch.from_numpy(scales.T).half(),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return tensors, (codes - zeros[:, groups]) * scales[:, groups]


def awq(weight: np.ndarray, seed: int) -> Stored:
    groups = np.arange(weight.shape[1]) // GROUP
    codes, scales, zeros = rounded(weight, groups)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])

    def pack(codes_NK: np.ndarray) -> torch.Tensor:
        return words(codes_NK.reshape(-1, 8, codes_NK.shape[1])[:, order].reshape(codes_NK.shape)).T

    tensors = {"qweight": pack(codes), "qzeros": pack(zeros), "scales": torch.from_numpy(scales.T).half()}
    return tensors, (codes - zeros[:, groups]) * scales[:, groups]


def fp8(weight: np.ndarray, seed: int) -> Stored:
    scales = np.abs(weight).max(1, keepdims=True) / 448
    codes = torch.from_numpy(weight / scales).float().to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.from_numpy(scales).float()}
    return tensors, codes.double().numpy() * tensors["weight_scale"].double().numpy()


def int8(weight: np.ndarray, seed: int) -> Stored:
    largest = np.abs(weight).max(1).astype(np.float32)
    codes = np.round(weight / largest[:, None] * 127).astype(np.int8)
    tensors = {"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(largest)}
    return tensors, codes * largest[:, None].astype(np.float64) / 127


FORMATS: dict[str, tuple[Callable[[np.ndarray, int], Stored], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "fp8": (fp8, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_stored_weights(name: str, kernels: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, **SIZES)
    store, settings = FORMATS[name]
    tensors = load_file(tmp_path / "model.safetensors")
    parameters = dict(model.named_parameters())
    for seed, full_name in enumerate([key for key in tensors if key.endswith("_proj.weight")]):
        parts, values = store(tensors.pop(full_name).double().numpy(), seed)
        stem = full_name.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        parameters[full_name].data = torch.from_numpy(values).float()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with torch.inference_mode():
        rows = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    expected = [rows[position, token].item() for position, token in enumerate(PROMPT[1:])]
    core = build(engine_config(tmp_path, kernels=kernels))
    done = run(core, [request("0", PROMPT, 2, prompt_logprobs=1)], 1)["0"]
    core.close()
    assert [entry.logprob for entry in done.prompt_logprobs or []] == pytest.approx(expected, abs=1e-3)
