"""Root-mean-square normalisation, alone and fused with the residual addition before it."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.ops import Ops


class RMSNorm:
    """x / rms(x) * weight, over the last dimension K."""

    __slots__ = ("eps", "weight_K")

    def __init__(self, weight_K: Tensor, eps: float) -> None:
        self.weight_K = weight_K
        self.eps = eps

    def __call__(self, x_TK: Tensor, ops: Ops) -> Tensor:
        return ops.rms_norm(x_TK, self.weight_K, self.eps)

    def add(self, x_TK: Tensor, residual_TK: Tensor, ops: Ops) -> Tensor:
        """residual += x, in place; the norm of the sum."""
        return ops.add_rms_norm(x_TK, residual_TK, self.weight_K, self.eps)
