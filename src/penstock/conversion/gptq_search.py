"""GPTQ: codes chosen column by column, each column's error made up for by those that are still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). With the
inputs' second moments H = X^T X, rounding input k costs least if the rows of weights not yet rounded move by
-error / [H^-1]_kk * [H^-1]_k,(k+1).., which the Cholesky factor of H^-1 holds for all k at once.

Shapes: N outputs, K inputs, G groups.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from penstock.base.errors import CheckpointError
from penstock.conversion.group_codes import Grid, GroupCodes, choose_scales, codes_of

_BLOCK: Final = 128  # columns whose errors reach the rest of the matrix in one product
_DAMPING: Final = (0.01, 0.1, 1.0)  # shares of the mean of H's diagonal, the next where one is too small


def gptq(weight_NK: Tensor, moments_KK: Tensor, grid: Grid, act_order: bool) -> GroupCodes:
    """weight: float32. moments: X^T X of the linear's inputs, float32. K is a multiple of the group.

    act_order: inputs are rounded from the largest to the smallest. Groups are of neighbours all the same (other loaders
    no longer read anything else), with scales that are chosen before any rounding.
    Raises CheckpointError when the moments are not those of finite numbers.
    """
    count, columns = weight_NK.shape
    width = grid.width(columns)
    diagonal = moments_KK.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    factor_KK = _inverse_factor(moments_KK[order][:, order])
    importance_K = diagonal[order]
    left_KN = weight_NK.T[order].contiguous()
    left_KN[importance_K == 0] = 0  # inputs that were never seen
    codes_KN = torch.empty(columns, count, dtype=torch.uint8)
    scales_NG, zeros_NG = torch.empty(2, count, columns // width).unbind(0)
    groups_K = order // width
    if act_order:
        members = left_KN[order.argsort()].T.reshape(count, -1, width)
        found = choose_scales(members, grid, diagonal.view(-1, width))
        scales_NG, zeros_NG = (part[:, :, 0] for part in found)
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors_BN = torch.empty(end - begin, count)
        for column in range(begin, end):
            group = int(groups_K[column])
            if column % width == 0 and not act_order:
                members = left_KN[column : column + width].T[:, None]
                found = choose_scales(members, grid, importance_K[column : column + width][None])
                scales_NG[:, group], zeros_NG[:, group] = (part[:, 0, 0] for part in found)
            scales, zeros = scales_NG[:, group], zeros_NG[:, group]
            codes = codes_of(left_KN[column], scales, zeros, grid)
            error = (left_KN[column] - (codes - zeros) * scales) / factor_KK[column, column]
            codes_KN[column], errors_BN[column - begin] = codes.to(torch.uint8), error
            left_KN[column + 1 : end].addr_(factor_KK[column, column + 1 : end], error, alpha=-1)
        left_KN[end:].addmm_(factor_KK[begin:end, end:].T, errors_BN, alpha=-1)
    back = order.argsort()
    codes_NK = codes_KN[back].T.contiguous()
    return GroupCodes(codes_NK, scales_NG, zeros_NG.to(torch.uint8), groups_K[back].to(torch.int32))


def _inverse_factor(moments_KK: Tensor) -> Tensor:
    """The upper U with U^T U = H^-1, of H with a little added to its diagonal."""
    diagonal = moments_KK.diagonal()
    mean = diagonal.mean()
    if not mean.isfinite():
        raise CheckpointError(
            "The model gives numbers that are not finite for the calibration text.", remedy="Is the checkpoint whole?"
        )
    for share in _DAMPING:
        damped = moments_KK + torch.diag(torch.where(diagonal == 0, mean.clamp(min=1e-6), share * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    raise CheckpointError("The moments of the calibration text cannot be inverted.", remedy="Give more varied text.")
