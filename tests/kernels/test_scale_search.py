"""The search for scales against torch, per instruction set."""

from __future__ import annotations

import pytest
import torch

from penstock._native import isa_statuses
from penstock.kernels import ops as op_table

REFERENCE = op_table.load("reference", 1).scale_search


def groups(count: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and weights [count / 2, 2, size], among them groups of zeros, of one sign and with ties."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=source) * torch.rand(count, 1, generator=source) * 3
    x[3] = 0
    x[4] = x[4].abs()
    x[5] = -x[5].abs()
    x[6] = (x[6] * 2).round()
    weight = x.abs() + torch.rand(count, size, generator=source)
    return x.view(-1, 2, size), weight.view(-1, 2, size)


def affine_error(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor, top: int):
    scale, low = scales[..., None], -minimums[..., None]
    codes = ((x - low) / scale).nan_to_num().round().clamp(0, top)
    return (weight * (scale * codes + low - x).square()).sum(2)


@pytest.mark.parametrize(("size", "top"), [(16, 3), (32, 15), (32, 31)])
@pytest.mark.parametrize("count", [10, 16, 5000])
def test_affine(native: op_table.Ops, size: int, top: int, count: int) -> None:
    x, weight = groups(count, size)
    scales, minimums = native.scale_search.affine(x, weight, top)
    expected = REFERENCE.affine(x, weight, top)
    assert (minimums >= 0).all()
    # A sum in another order may choose another start that is as good.
    is_same = torch.isclose(scales, expected[0], rtol=1e-4) & torch.isclose(minimums, expected[1], rtol=1e-4, atol=1e-6)
    assert (~is_same).sum() <= 1 + 0.02 * count
    ours, theirs = affine_error(x, weight, scales, minimums, top), affine_error(x, weight, *expected, top)
    torch.testing.assert_close(ours.sum(), theirs.sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("size", "half"), [(16, 4), (16, 32), (32, 8)])
@pytest.mark.parametrize("count", [10, 16, 5000])
def test_symmetric(native: op_table.Ops, size: int, half: int, count: int) -> None:
    x, weight = groups(count, size)
    scales, expected = native.scale_search.symmetric(x, weight, half), REFERENCE.symmetric(x, weight, half)
    assert (~torch.isclose(scales, expected, rtol=1e-4)).sum() <= 1 + 0.02 * count
    errors = [
        (weight * ((x / scale[..., None]).nan_to_num().round().clamp(-half, half - 1) * scale[..., None] - x).square())
        for scale in (scales, expected)
    ]
    torch.testing.assert_close(errors[0].sum(), errors[1].sum(), rtol=1e-3, atol=0)


def test_any_processor_and_number_of_threads_find_the_same() -> None:
    x, weight = groups(9000, 32, seed=1)
    isas = [name for name, works, _ in isa_statuses() if works]
    tables = [op_table.load("native", threads, isa=isa) for isa in isas for threads in (1, 2)]
    found = [ops.scale_search.affine(x, weight, 15) for ops in tables]
    for scales, minimums in found[1:]:
        assert torch.equal(scales, found[0][0])
        assert torch.equal(minimums, found[0][1])
