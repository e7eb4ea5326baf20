"""The gated feed-forward block: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.layers.linear import Linear


class GatedMLP:
    """gate_up: [2I, D], gate's rows first. down: [D, I]."""

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x_TD: Tensor, ops: Ops) -> Tensor:
        gate_up_TJ = self.gate_up(x_TD, ops)
        return self.down(ops.silu_and_mul(gate_up_TJ), ops)
