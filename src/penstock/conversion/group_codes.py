"""Whole numbers for the values of a matrix: a scale and a zero point for each output and group of inputs.

Shapes: N outputs, K inputs, G groups, E inputs of a group.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

NUM_SHARES: Final = 32
_SMALLEST_SHARE: Final = 0.45
_TINY: Final = 1e-8


class Grid(NamedTuple):
    """What codes there are. group_size: inputs that share a scale; 0: all of a row.

    is_symmetric: the zero point is in the middle; otherwise it is chosen, 1 at least: the first GPTQ format stores one
    less. scales are rounded to `scale_dtype`.
    """

    bits: int
    group_size: int
    is_symmetric: bool
    scale_dtype: torch.dtype = torch.float16

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def width(self, num_columns: int) -> int:
        """Inputs of a group of a row of so many."""
        return self.group_size or num_columns


class GroupCodes(NamedTuple):
    """value[n, k] = scales[n, groups[k]] * (codes[n, k] - zeros[n, groups[k]])."""

    codes: Tensor  # uint8 [N, K]
    scales: Tensor  # float32 [N, G]
    zeros: Tensor  # uint8 [N, G]
    groups: Tensor  # int32 [K]

    def values(self) -> Tensor:
        """float32 [N, K]"""
        groups_K = self.groups.long()
        return self.scales[:, groups_K] * (self.codes.float() - self.zeros.float()[:, groups_K])


def choose_scales(
    x_NGE: Tensor, grid: Grid, importance_GE: Tensor | None = None, num_shares: int = NUM_SHARES
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32 [N, G, 1] both, with the least error over several shares of the full range.

    importance_GE: how much the squared error of each input counts. num_shares: 1 takes the full range untried.
    """
    if grid.is_symmetric:
        full = x_NGE.abs().amax(2, keepdim=True) / (grid.middle - 0.5)
        zeros = torch.full_like(full, float(grid.middle))
    else:
        low, high = x_NGE.amin(2, keepdim=True).clamp(max=0), x_NGE.amax(2, keepdim=True).clamp(min=0)
        full = (high - low) / grid.top
    best = torch.full_like(full, torch.inf)
    best_scales, best_zeros = full, torch.full_like(full, float(grid.middle))
    for share in torch.linspace(1.0, _SMALLEST_SHARE, num_shares).tolist():
        scales = (full * share).clamp(min=_TINY).to(grid.scale_dtype).float().clamp(min=_TINY)
        if not grid.is_symmetric:
            zeros = (-low * share / scales).round().clamp(1, grid.top)
        errors = (snap(x_NGE, scales, zeros, grid) - x_NGE).square_()
        error = (errors if importance_GE is None else errors * importance_GE).sum(2, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scales, best_zeros = torch.where(better, scales, best_scales), torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def codes_of(x: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """The nearest codes, float32."""
    return (x / scales + zeros).round_().clamp_(0, grid.top)


def snap(x: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """The nearest values that codes stand for."""
    return (codes_of(x, scales, zeros, grid) - zeros) * scales


def nearest(
    weight_NK: Tensor, grid: Grid, importance_K: Tensor | None = None, num_shares: int = NUM_SHARES
) -> GroupCodes:
    """Each value rounded by itself. K is a multiple of the group."""
    count, columns = weight_NK.shape
    width = grid.width(columns)
    x_NGE = weight_NK.float().view(count, -1, width)
    weights = None if importance_K is None else importance_K.view(-1, width)
    scales, zeros = choose_scales(x_NGE, grid, weights, num_shares)
    codes = codes_of(x_NGE, scales, zeros, grid).to(torch.uint8).view(count, columns)
    groups = torch.arange(columns, dtype=torch.int32) // width
    return GroupCodes(codes, scales.squeeze(2), zeros.squeeze(2).to(torch.uint8), groups)
