"""Blocks that we write: equal to ggml's where its rule is simple, and no worse than its search elsewhere."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from penstock.kernels import ops as op_table
from penstock.quantization.gguf_encode import ENCODABLE, encode
from penstock.quantization.gguf_types import dequantize

REFERENCE = op_table.load("reference", 1).scale_search
SEARCHES = {"reference": REFERENCE, "native": op_table.load("native", 2).scale_search}


def rows(kind: str) -> np.ndarray:
    random = np.random.default_rng(0)
    values = random.standard_normal((64, 1024)).astype(np.float32) * random.uniform(0.001, 3, (64, 1)).astype(
        np.float32
    )
    values[3, 256:512] = 0
    values[4] = np.abs(values[4])
    if kind == "heavy tails":
        values *= np.abs(random.standard_normal(values.shape)).astype(np.float32) ** 2
    return values


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "F16", "BF16", "F32"])
def test_simple_types_equal_ggml(name: str) -> None:
    for kind in ("normal", "heavy tails"):
        values = rows(kind)
        expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
        found = encode(name, torch.from_numpy(values), REFERENCE).numpy()
        np.testing.assert_array_equal(found, np.ascontiguousarray(expected).view(np.uint8))


# Root mean square error relative to the values'.
@pytest.mark.parametrize(
    ("name", "most"), [("Q2_K", 0.36), ("Q3_K", 0.19), ("Q4_K", 0.080), ("Q5_K", 0.042), ("Q6_K", 0.021)]
)
@pytest.mark.parametrize("kernels", SEARCHES)
def test_k_types_are_close(kernels: str, name: str, most: float) -> None:
    values = torch.from_numpy(rows("normal"))
    blocks = encode(name, values, SEARCHES[kernels])
    again = dequantize(name, blocks)
    expected = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(again.numpy(), expected)
    used = values.abs().amax(1) > 0
    error = (again - values)[used].square().mean(1).sqrt() / values[used].square().mean(1).sqrt()
    assert error.max() < most
    assert not again[3, 256:512].any()
    assert set(ENCODABLE) == {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "F16", "BF16", "F32"}


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0"])
def test_importance_moves_the_error(name: str) -> None:
    """From inputs that are large to those that are small."""
    values = torch.from_numpy(rows("normal"))[5:]
    importance = torch.randn(1024, generator=torch.Generator().manual_seed(1)).mul(1.5).exp()
    errors = [
        ((dequantize(name, encode(name, values, REFERENCE, chosen)) - values).square() * importance).mean().item()
        for chosen in (None, importance)
    ]
    assert errors[1] < 0.93 * errors[0]
