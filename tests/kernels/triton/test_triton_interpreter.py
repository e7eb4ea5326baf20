"""The interpreter rounds and multiplies as a GPU does, once repaired; as shipped, it does not."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(out_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at = rows * SIZE + columns
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(4096 - 256), torch.arange(256) / 64 + 1.0])
    out = torch.empty(4096, dtype=dtype)
    _cast_kernel[(1,)](x, out, SIZE=4096)
    assert torch.equal(out.float(), x.to(dtype).float())
    back = torch.empty(4096)
    _cast_kernel[(1,)](out, back, SIZE=4096)
    assert torch.equal(back, x.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_are_of_values(dtype: torch.dtype) -> None:
    a, b = (torch.randn(32, 32).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-4, atol=1e-4)


@triton.jit
def _arithmetic_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.arange(0, SIZE), (x - 3.5) * x + x)


def test_bfloat16_is_added_and_multiplied_rounded_once_each() -> None:
    x, out = torch.randn(64).bfloat16(), torch.empty(64, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](x, out, SIZE=64)
    assert torch.equal(out, (x - 3.5) * x + x)
