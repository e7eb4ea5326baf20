"""Attention without a cache against torch, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.reference.attention import full_attention as torch_full_attention
from penstock.kernels.triton.full_attention import full_attention


def texts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_heads", "head_dim", "lengths"),
    [(1, 32, [1]), (2, 64, [5, 1, 70, 64]), (3, 80, [130]), (1, 128, [129, 2]), (1, 256, [40, 65]), (2, 18, [3, 200])],
)
def test_equals_the_reference(num_heads: int, head_dim: int, lengths: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(sum(lengths), 3 * num_heads * head_dim, generator=generator).to(dtype)
    got = full_attention(qkv, texts(lengths), num_heads, head_dim**-0.5)
    wanted = torch_full_attention(qkv, texts(lengths), num_heads, head_dim**-0.5)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, wanted, rtol=bound, atol=bound)


def test_a_text_does_not_depend_on_the_others_not_even_on_a_nan() -> None:
    qkv = torch.randn(90, 3 * 2 * 32, generator=torch.Generator().manual_seed(0))
    alone = full_attention(qkv[7:50].contiguous(), texts([43]), 2, 0.2)
    qkv[:7] = torch.nan
    qkv[50:] = torch.nan
    assert torch.equal(full_attention(qkv, texts([7, 43, 40]), 2, 0.2)[7:50], alone)


def test_no_text() -> None:
    assert full_attention(torch.empty(0, 96), texts([]), 1, 1.0).shape == (0, 32)
