"""From what a config.json says to the format of its linears. To add a method: a file, a line here, one in config."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from penstock.config.quantization import QuantizationConfig
from penstock.quantization.awq import AWQFormat
from penstock.quantization.bitsandbytes import BitsAndBytesFormat
from penstock.quantization.compressed_tensors import CompressedTensorsFormat
from penstock.quantization.fp8 import FP8Format
from penstock.quantization.gptq import GPTQFormat
from penstock.quantization.stored_format import StoredFormat


def hub_format(dtype: torch.dtype, config: QuantizationConfig, tensor_types: Mapping[str, str]) -> StoredFormat:
    """The format of a quantised Hugging Face checkpoint. tensor_types: of every tensor by name."""
    match config.method:
        case "gptq":
            return GPTQFormat(dtype, config, tensor_types)
        case "awq":
            return AWQFormat(dtype, config, tensor_types)
        case "fp8":
            return FP8Format(dtype, config.block, tensor_types)
        case "compressed-tensors":
            return CompressedTensorsFormat(dtype, config, tensor_types)
    assert config.method == "bitsandbytes", config.method
    return BitsAndBytesFormat(dtype, tensor_types)
