"""AWQ: inputs that are large get finer weights, by a scale that is divided out before the linear.

Lin et al., "AWQ: Activation-aware Weight Quantization" (2023): of s = (mean |x|) ** a over several a, the one with the
least ||Q(W diag(s)) diag(1 / s) x - W x|| on calibration inputs.

Shapes: N outputs, K inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from penstock.conversion.group_codes import Grid, nearest

_STEPS: Final = 20
_SMALLEST: Final = 1e-4


def input_scales(weights_NK: Sequence[Tensor], x_TK: Tensor, magnitude_K: Tensor, grid: Grid) -> Tensor:
    """The scales s of the inputs that the linears `weights` share, float32 [K]. x: a sample; magnitude: mean |x|."""
    weight_NK = torch.cat(list(weights_NK))
    best, best_scales = torch.inf, torch.ones_like(magnitude_K)
    for step in range(_STEPS):
        scales_K = magnitude_K.clamp(min=_SMALLEST).pow(step / _STEPS)
        scales_K = scales_K / (scales_K.max() * scales_K.min()).sqrt()
        rounded_NK = nearest(weight_NK * scales_K, grid, num_shares=1).values() / scales_K
        error = (x_TK @ (rounded_NK - weight_NK).T).square_().mean().item()
        if error < best:
            best, best_scales = error, scales_K
    return best_scales
