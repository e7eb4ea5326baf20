"""Attention within whole texts against torch, per instruction set and element type."""

from __future__ import annotations

import itertools

import pytest
import torch

from penstock.kernels import ops as op_table

REFERENCE = op_table.load("reference", 1)
DTYPES = [torch.float32, torch.bfloat16]


def make(lengths: list[int], heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv [sum of lengths, 3 heads dim] and the texts' first tokens."""
    generator = torch.Generator().manual_seed(sum(lengths) * 1000 + dim)
    qkv = (2 * torch.randn(sum(lengths), 3 * heads * dim, generator=generator)).to(dtype)
    return qkv, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "dim"),
    [([1], 1, 2), ([5, 1, 9], 3, 14), ([31, 32, 33], 2, 32), ([200, 3, 77], 4, 64), ([40], 2, 100), ([3, 0, 4], 1, 8)],
)
def test_full_attention(native: op_table.Ops, lengths: list[int], heads: int, dim: int, dtype: torch.dtype) -> None:
    qkv, starts = make(lengths, heads, dim, dtype)
    got = native.full_attention(qkv, starts, heads, dim**-0.5)
    wanted = REFERENCE.full_attention(qkv, starts, heads, dim**-0.5)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_text_does_not_depend_on_the_others(native: op_table.Ops, dtype: torch.dtype) -> None:
    lengths = [17, 64, 1, 90]
    qkv, starts = make(lengths, 4, 48, dtype)
    together = native.full_attention(qkv, starts, 4, 0.2)
    for begin, end in itertools.pairwise(starts.tolist()):
        alone_starts = torch.tensor([0, end - begin], dtype=torch.int32)
        alone = native.full_attention(qkv[begin:end].clone(), alone_starts, 4, 0.2)
        assert torch.equal(alone, together[begin:end])


def test_a_nan_stays_in_its_text(native: op_table.Ops) -> None:
    qkv, starts = make([6, 6], 2, 16, torch.float32)
    expected = native.full_attention(qkv, starts, 2, 0.25)
    qkv[2] = torch.nan
    got = native.full_attention(qkv, starts, 2, 0.25)
    assert got[:6].isnan().all()
    assert torch.equal(got[6:], expected[6:])
