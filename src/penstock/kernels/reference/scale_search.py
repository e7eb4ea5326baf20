"""The search for a group's scale, as ggml-quants.c does it (make_qkx2_quants, make_qx_quants).

Weighted least squares over several starting scales. Shapes: N blocks, G groups of a block, E values of a group.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_STEPS: Final = 21
_TINY: Final = 1e-15


class ReferenceScaleSearch:
    """See kernels/ops.py: ScaleSearch."""

    def affine(self, x_NGE: Tensor, weight_NGE: Tensor, top: int) -> tuple[Tensor, Tensor]:
        low, high = x_NGE.amin(2, keepdim=True).clamp(max=0), x_NGE.amax(2, keepdim=True)
        sum_w, sum_x = weight_NGE.sum(2, keepdim=True), (weight_NGE * x_NGE).sum(2, keepdim=True)
        best_scale, best_low = (high - low).clamp(min=_TINY) / top, low
        codes = ((x_NGE - low) / best_scale).round_().clamp_(0, top)
        best_error = (weight_NGE * (best_scale * codes + low - x_NGE).square_()).sum(2, keepdim=True)
        for step in range(_STEPS):
            span = (high - best_low).clamp(min=_TINY)
            codes = ((x_NGE - best_low) * ((top - 1 + 0.1 * step) / span)).round_().clamp_(0, top)
            weighted = weight_NGE * codes
            sum_l, sum_l2 = weighted.sum(2, keepdim=True), (weighted * codes).sum(2, keepdim=True)
            sum_xl = (weighted * x_NGE).sum(2, keepdim=True)
            determinant = sum_w * sum_l2 - sum_l.square()
            scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
            new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            above = new_low > 0
            scale = torch.where(above, sum_xl / sum_l2.clamp(min=_TINY), scale)
            new_low = new_low.clamp(max=0)
            error = (weight_NGE * codes.mul_(scale).add_(new_low).sub_(x_NGE).square_()).sum(2, keepdim=True)
            better = (determinant > 0) & (error < best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_low = torch.where(better, new_low, best_low)
            best_error = torch.where(better, error, best_error)
        return best_scale.squeeze(2), -best_low.squeeze(2)

    def symmetric(self, x_NGE: Tensor, weight_NGE: Tensor, half: int) -> Tensor:
        largest = x_NGE.gather(2, x_NGE.abs().argmax(2, keepdim=True))
        usable = torch.where(largest.abs() < _TINY, 1.0, largest)
        best_scale = torch.zeros_like(largest)
        best = torch.full_like(largest, -1.0)
        for step in range(_STEPS):
            codes = (x_NGE * (-(half + 0.1 * (step - _STEPS // 2)) / usable)).round_().clamp_(-half, half - 1)
            weighted = weight_NGE * codes
            sum_xl, sum_l2 = (weighted * x_NGE).sum(2, keepdim=True), (weighted * codes).sum(2, keepdim=True)
            gained = sum_xl.square() / sum_l2.clamp(min=_TINY)
            better = (sum_l2 > 0) & (gained > best)
            best_scale = torch.where(better, sum_xl / sum_l2.clamp(min=_TINY), best_scale)
            best = torch.where(better, gained, best)
        return torch.where(largest.abs() < _TINY, 0.0, best_scale).squeeze(2)
