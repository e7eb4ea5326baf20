"""Norms and activations against torch, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.kv_layout import QUANTIZED_DTYPES
from penstock.kernels.reference import activation as torch_activation
from penstock.kernels.reference import norm as torch_norm
from penstock.kernels.rounded import ActivationForm, RoundedActivations
from penstock.kernels.triton import activation, norm, rounding

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 2, 17, 64, 100, 513, 1024]


def rows(tokens: int, size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the last bit of a rounding."""
    bound = 1e-5 if got.dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got, wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(dtype: torch.dtype, size: int) -> None:
    x, weight = rows(3, size, dtype), rows(1, size, dtype, 1)[0]
    close(norm.rms_norm(x, None, weight, 1e-5), torch_norm.rms_norm(x, None, weight, 1e-5))
    assert norm.rms_norm(x[:0], None, weight, 1e-5).shape == (0, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_add_rms_norm_changes_the_residual(dtype: torch.dtype, size: int) -> None:
    x, residual, weight = rows(3, size, dtype), rows(3, size, dtype, 1), rows(1, size, dtype, 2)[0]
    expected_residual = residual.clone()
    wanted = torch_norm.rms_norm(x, expected_residual, weight, 1e-6)
    close(norm.rms_norm(x, residual, weight, 1e-6), wanted)
    assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_layer_norm(dtype: torch.dtype, size: int, with_residual: bool) -> None:
    x, weight, bias = rows(3, size, dtype) + 5, rows(1, size, dtype, 2)[0], rows(1, size, dtype, 3)[0]
    residual = rows(3, size, dtype, 1) if with_residual else None
    wanted = torch_norm.layer_norm(x, residual, weight, bias, 1e-5)
    close(norm.layer_norm(x, residual, weight, bias, 1e-5), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 100, 1500])
def test_activations(dtype: torch.dtype, size: int) -> None:
    x = rows(2, 2 * size, dtype)
    close(activation.silu_and_mul(x), torch_activation.silu_and_mul(x))
    close(activation.gelu(x), torch_activation.gelu(x))


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [T, K] through codes of `dtype` with a scale a row, in torch."""
    scale = x.float().abs().amax(1, keepdim=True) / QUANTIZED_DTYPES[dtype]
    scale = torch.where(scale == 0, 1.0, scale)
    scaled = x.float() / scale
    return (scaled.round() if dtype == torch.int8 else scaled.to(dtype).float()) * scale


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("size", [1, 40, 1000])
def test_rounding_to_8_bits(dtype: torch.dtype, size: int) -> None:
    x = rows(4, size, torch.bfloat16)
    x[1] = 0.0
    codes, scales = activation.quantize(x, ActivationForm(dtype, 0))
    codes, scales = codes[:, :size], scales[:, 0]
    # A quotient may fall on the other side of a tie: one step of the code at most.
    step = scales[:, None] * (1.0 if dtype == torch.int8 else 32.0)
    assert ((codes.float() * scales[:, None] - rounded(x, dtype)).abs() <= step * 1.001).all()
    differ = (codes.float() * scales[:, None] - rounded(x, dtype)).abs() > 1e-4 * x.float().abs()
    assert differ.float().mean() < 0.02
    assert (codes[1].float() == 0).all()


FORMS = [rounding.FP8_BLOCKS, rounding.INT8_BLOCKS, rounding.INT8_ROWS]


def same(got: RoundedActivations, wanted: RoundedActivations) -> None:
    """Bit for bit, the padding included; a NaN is a NaN."""
    assert got.codes.dtype is wanted.codes.dtype
    assert got.codes.shape == wanted.codes.shape
    assert torch.equal(got.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    assert got.scales.shape == wanted.scales.shape
    assert torch.equal(got.scales.nan_to_num(-1.0), wanted.scales.nan_to_num(-1.0))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", [1, 40, 128, 200, 352, 1024])
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_norm_rounds_as_the_linear_behind_it_would(form: ActivationForm, size: int, with_residual: bool) -> None:
    x, weight = rows(4, size, torch.bfloat16), rows(1, size, torch.bfloat16, 2)[0]
    residual = rows(4, size, torch.bfloat16, 1) if with_residual else None
    x[1], x[3, size // 2] = 0.0, 3e4
    copy = None if residual is None else residual.clone()
    normed = norm.rms_norm(x, copy, weight, 1e-5)
    same(norm.rms_norm_quantize(x, residual, weight, 1e-5, form), activation.quantize(normed, form))
    assert residual is None or torch.equal(residual, copy)
    assert norm.rms_norm_quantize(x[:0], None, weight, 1e-5, form).codes.shape[0] == 0


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", [1, 40, 128, 200, 352, 1500])
def test_an_activation_rounds_as_the_linear_behind_it_would(form: ActivationForm, size: int) -> None:
    gate_up = rows(4, 2 * size, torch.bfloat16)
    gate_up[1], gate_up[2, -1] = 0.0, 3e4
    wanted = activation.quantize(activation.silu_and_mul(gate_up), form)
    same(activation.silu_and_mul_quantize(gate_up, form), wanted)
    assert activation.silu_and_mul_quantize(gate_up[:0], form).codes.shape[0] == 0


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_a_scale_that_is_nan(form: ActivationForm, bad: float) -> None:
    x, weight = rows(3, 512, torch.bfloat16), rows(1, 512, torch.bfloat16, 2)[0]
    expected = activation.quantize(x, form)
    x[1, 300] = bad
    rounded = activation.quantize(x, form)
    block = 300 // form.block if form.block else 0
    assert rounded.scales.isnan().nonzero().tolist() == [[1, block]]
    for part in (0, 2):
        assert torch.equal(rounded.codes[part].view(torch.uint8), expected.codes[part].view(torch.uint8))
        assert torch.equal(rounded.scales[part], expected.scales[part])
    normed = norm.rms_norm(x, None, weight, 1e-5)
    same(norm.rms_norm_quantize(x, None, weight, 1e-5, form), activation.quantize(normed, form))
