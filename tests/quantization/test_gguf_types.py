"""Every GGUF type against the gguf package's own dequantization, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from penstock.loader.gguf_file import TENSOR_TYPES, block_of
from penstock.quantization.gguf_types import dequantize, is_known

QUANTIZED = [name for name, items, _ in TENSOR_TYPES.values() if items > 1]
# Where the float16 scales of a block lie: random bits there would often be NaN, of which nothing can be compared.
HALVES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "MXFP4": (), "IQ1_M": (),
}  # fmt: skip


def random_blocks(name: str, count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (count, block_of(name)[1]), dtype=np.uint8)
    for at in HALVES.get(name, (0,)):
        scales = (random.standard_normal(count) * 10.0 ** random.uniform(-6, 3, count)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(count, 2)
    if name == "MXFP4":
        blocks[:, 0] = np.arange(count) % 252  # the last ones overflow, or stand for NaN
    if name == "IQ1_M":
        blocks[:, 55] &= 0xBF  # the highest bits of its scale's exponent: not all set
    return blocks


def bits(values: np.ndarray) -> np.ndarray:
    """The bits, with one zero: a product of nothing may have either sign."""
    return (values + np.float32(0)).view(np.uint32)


@pytest.mark.parametrize("name", QUANTIZED)
def test_values_equal_the_gguf_packages(name: str) -> None:
    assert is_known(name)
    blocks = random_blocks(name, 4096)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert np.isfinite(expected).all()
    found = dequantize(name, torch.from_numpy(blocks)).numpy()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(bits(found), bits(expected))
    rows = dequantize(name, torch.from_numpy(blocks.reshape(8, -1))).numpy()
    np.testing.assert_array_equal(bits(rows).ravel(), bits(expected).ravel())


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_float_types_are_widened(name: str) -> None:
    values = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])
    found = dequantize(name, torch.from_numpy(np.ascontiguousarray(stored).view(np.uint8)))
    np.testing.assert_array_equal(bits(found.numpy()), bits(expected))
