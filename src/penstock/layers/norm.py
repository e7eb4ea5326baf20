"""Normalisation, by root mean square or by mean and variance, alone and fused with the addition before it."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.kernels.rounded import ActivationForm, Activations


class RMSNorm:
    """x / rms(x) * weight, over the last dimension K."""

    __slots__ = ("eps", "weight_K")

    def __init__(self, weight_K: Tensor, eps: float) -> None:
        self.weight_K = weight_K
        self.eps = eps

    def __call__(self, x_TK: Tensor, ops: Ops) -> Tensor:
        return ops.rms_norm(x_TK, None, self.weight_K, self.eps)

    def into(self, form: ActivationForm | None, x_TK: Tensor, residual_TK: Tensor | None, ops: Ops) -> Activations:
        """The norm of x, or with a residual `add`, as a linear of that form (Linear.form) takes it."""
        if form is not None:
            assert ops.rounded is not None
            return ops.rounded.rms_norm(x_TK, residual_TK, self.weight_K, self.eps, form)
        return self(x_TK, ops) if residual_TK is None else self.add(x_TK, residual_TK, ops)

    def add(self, x_TK: Tensor, residual_TK: Tensor, ops: Ops) -> Tensor:
        """residual += x, in place; the norm of the sum."""
        return ops.rms_norm(x_TK, residual_TK, self.weight_K, self.eps)


class LayerNorm:
    """(x - mean) / deviation * weight + bias, over the last dimension K."""

    __slots__ = ("bias_K", "eps", "weight_K")

    def __init__(self, weight_K: Tensor, bias_K: Tensor, eps: float) -> None:
        self.weight_K = weight_K
        self.bias_K = bias_K
        self.eps = eps

    def __call__(self, x_TK: Tensor, ops: Ops, residual_TK: Tensor | None = None) -> Tensor:
        """Of x, or of x + residual; neither changes."""
        return ops.layer_norm(x_TK, residual_TK, self.weight_K, self.bias_K, self.eps)
