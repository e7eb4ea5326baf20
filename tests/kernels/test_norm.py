"""RMSNorm against torch, per instruction set and element type."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels import ops as op_table

REFERENCE = op_table.load("reference", 1)
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 16), (3, 7), (5, 64), (2, 130), (33, 2048), (200, 576)]


def make(tokens: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and residual [tokens, size] of uneven rows, weight [size]."""
    generator = torch.Generator().manual_seed(tokens * 10_000 + size)
    x, residual = (torch.randn(2, tokens, size, generator=generator) * torch.logspace(-3, 2, tokens)[:, None]).to(dtype)
    return x, residual, (1 + 0.3 * torch.randn(size, generator=generator)).to(dtype)


def check_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """float32 to its rounding; bfloat16 to one step of it, which a last bit of the scale can decide, in few places."""
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-7)
        return
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=1e-6)
    assert (got != wanted).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(native: op_table.Ops, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, _, weight = make(*shape, dtype)
    check_close(native.rms_norm(x, None, weight, 1e-5), REFERENCE.rms_norm(x, None, weight, 1e-5))


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_rounded_once(native: op_table.Ops, shape: tuple[int, int]) -> None:
    x, _, weight = make(*shape, torch.bfloat16)
    exact = torch.nn.functional.rms_norm(x.double(), (shape[1],), weight.double(), 1e-5).bfloat16()
    for ops in (native, REFERENCE):
        check_close(ops.rms_norm(x, None, weight, 1e-5), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(native: op_table.Ops, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight = make(*shape, dtype)
    reference_residual = residual.clone()
    wanted = REFERENCE.rms_norm(x, reference_residual, weight, 1e-6)
    got = native.rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, reference_residual)
    check_close(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(native: op_table.Ops, dtype: torch.dtype) -> None:
    x, _, weight = make(301, 1000, dtype)
    together = native.rms_norm(x, None, weight, 1e-5)
    for row in (0, 7, 150, 300):
        assert torch.equal(native.rms_norm(x[row : row + 1].clone(), None, weight, 1e-5)[0], together[row])


def test_a_row_of_nan_stays_alone(native: op_table.Ops) -> None:
    x, _, weight = make(4, 64, torch.float32)
    expected = native.rms_norm(x, None, weight, 1e-5)
    x[2, 5] = torch.nan
    got = native.rms_norm(x, None, weight, 1e-5)
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_sum", [False, True])
def test_layer_norm(native: op_table.Ops, shape: tuple[int, int], dtype: torch.dtype, is_sum: bool) -> None:
    x, residual, weight = make(*shape, dtype)
    bias = (weight.float() - 0.7).to(dtype)
    x += 2 * x.abs().mean(-1, keepdim=True)  # a mean beside the deviation
    before = x.clone()
    got = native.layer_norm(x, residual if is_sum else None, weight, bias, 1e-5)
    wanted = REFERENCE.layer_norm(x, residual if is_sum else None, weight, bias, 1e-5)
    if dtype == torch.float32:
        wide = (x + residual if is_sum else x).double()
        exact = torch.nn.functional.layer_norm(wide, (shape[1],), weight.double(), bias.double(), 1e-5)
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=3e-6)
        torch.testing.assert_close(wanted.double(), exact, rtol=1e-5, atol=3e-6)
    else:
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-8)
    assert torch.equal(x, before), "layer_norm changes no input"


def test_layer_norm_of_a_row_does_not_depend_on_the_others(native: op_table.Ops) -> None:
    x, residual, weight = make(301, 1000, torch.float32)
    together = native.layer_norm(x, residual, weight, weight, 1e-5)
    for row in (0, 7, 150, 300):
        alone = native.layer_norm(x[row : row + 1].clone(), residual[row : row + 1].clone(), weight, weight, 1e-5)
        assert torch.equal(alone[0], together[row])
