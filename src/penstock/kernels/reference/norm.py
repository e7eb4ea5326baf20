"""RMSNorm and LayerNorm, alone and after a sum, in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def rms_norm(x_TK: Tensor, residual_TK: Tensor | None, weight_K: Tensor, eps: float) -> Tensor:
    """See Ops.rms_norm."""
    wide = (x_TK if residual_TK is None else residual_TK.add_(x_TK)).float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (scaled * weight_K.float()).to(x_TK.dtype)


def layer_norm(x_TK: Tensor, residual_TK: Tensor | None, weight_K: Tensor, bias_K: Tensor, eps: float) -> Tensor:
    """See Ops.layer_norm."""
    wide = (x_TK if residual_TK is None else x_TK + residual_TK).float()
    return torch.nn.functional.layer_norm(wide, weight_K.shape, weight_K.float(), bias_K.float(), eps).to(x_TK.dtype)
