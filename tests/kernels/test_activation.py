"""The activations against torch, per instruction set and element type."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels import ops as op_table

REFERENCE = op_table.load("reference", 1)
DTYPES = [torch.float32, torch.bfloat16]


def gate_up(tokens: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens * 10_000 + size)
    return (torch.randn(tokens, 2 * size, generator=generator) * 4).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (3, 33), (1, 8192), (70, 1100), (5, 2048)])
def test_equals_the_reference(native: op_table.Ops, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = gate_up(*shape, dtype)
    got, wanted = native.silu_and_mul(x), REFERENCE.silu_and_mul(x)
    if dtype == torch.float32:
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)
    else:
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=1e-6)
        assert (got != wanted).float().mean() < 0.005


def test_extremes(native: op_table.Ops) -> None:
    gates = [0.0, -0.0, 1e-30, -1e-30, 87.0, -87.0, 88.0, -88.0, -89.0, 100.0, -100.0, 1e30, -1e30]
    x = torch.tensor([[*gates, torch.inf, torch.nan, *[1.0] * (len(gates) + 2)]])
    got, wanted = native.silu_and_mul(x), REFERENCE.silu_and_mul(x)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(native: op_table.Ops, dtype: torch.dtype) -> None:
    x = gate_up(67, 1500, dtype)
    together = native.silu_and_mul(x)
    for row in (0, 31, 66):
        assert torch.equal(native.silu_and_mul(x[row : row + 1].clone())[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (200, 1536)])
def test_gelu(native: op_table.Ops, shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    x = (4 * torch.randn(shape, generator=generator)).to(dtype)
    x.view(-1)[0] = 0.0
    exact = torch.nn.functional.gelu(x.double())
    rtol = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(native.gelu(x).double(), exact, rtol=rtol, atol=4e-7)
    torch.testing.assert_close(REFERENCE.gelu(x).double(), exact, rtol=rtol, atol=2e-6)
    assert native.gelu(torch.tensor([[torch.nan, 30.0, -30.0]]))[0, 1:].tolist() == [30.0, 0.0]
