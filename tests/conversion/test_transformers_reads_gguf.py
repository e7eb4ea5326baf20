"""GGUF files of ours through transformers' own reader, and a whole FP8 model beside its unpacking."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint
from penstock.conversion import convert
from prompt_logprobs import SIZES, our_logprobs, their_logprobs


@pytest.mark.parametrize(("target", "tolerance"), [("f16", 1e-4), ("q8_0", 0.05), ("q4_0", 0.05), ("q4_k_m", 0.05)])
def test_gguf_files_give_the_logits_of_transformers(target: str, tolerance: float, tmp_path: Path) -> None:
    """The quantised ones differ by the rounding of activations to 8 bits alone."""
    import transformers

    write_checkpoint(tmp_path / "float", dtype="float16", tokenizer=True, **SIZES)
    convert(tmp_path / "float", tmp_path / "m.gguf", target, lambda _share: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert our_logprobs(tmp_path / "m.gguf", "float32") == pytest.approx(their_logprobs(model), abs=tolerance)


def test_fp8_blocks_give_the_logits_of_transformers(tmp_path: Path) -> None:
    import transformers

    write_checkpoint(tmp_path, tokenizer=True, **SIZES)
    tensors, stored = load_file(tmp_path / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        blocks = tensor.view(tensor.shape[0] // 128, 128, tensor.shape[1] // 128, 128)
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448
        stored[name] = (blocks / scales).view(tensor.shape).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales[:, 0, :, 0].contiguous()
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    unpacked = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=unpacked
    )
    assert our_logprobs(tmp_path, "float32") == pytest.approx(their_logprobs(model), abs=1e-3)
