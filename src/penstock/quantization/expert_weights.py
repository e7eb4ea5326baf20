"""A mixture's experts as they are kept: each by itself on a host, below each other in one matrix on a GPU.

A host multiplies expert by expert, those that have tokens. A GPU may not ask which these are: one kernel serves all.
Shapes: T tokens, K experts of a token, P = T K pairs of a token and one of its experts, D hidden, I inner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from penstock.base.errors import CheckpointError
from penstock.kernels.ops import Ops
from penstock.quantization.linear_format import LinearWeight
from penstock.quantization.packed_weight import PackedWeight, SplitWeight


class ExpertWeights(Protocol):
    """The experts' gate_up [2 I, D], gate's rows first, and down [D, I]."""

    def mlp(self, x_TD: Tensor, chosen: tuple[Tensor, Tensor], ops: Ops) -> Tensor:
        """The sum over a token's experts of weight * down(silu(gate(x)) * up(x)) -> [T, D].

        chosen: of ops.experts.choose.
        """
        ...


class SeparateExperts:
    """Weights of one expert after another. Each is read once for all its tokens; a row's bits are its own."""

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: Sequence[LinearWeight], down: Sequence[LinearWeight]) -> None:
        self.gate_up = list(gate_up)
        self.down = list(down)

    def mlp(self, x_TD: Tensor, chosen: tuple[Tensor, Tensor], ops: Ops) -> Tensor:
        experts_TK, weights_TK = chosen
        experts_P = experts_TK.flatten()
        pairs_P = experts_P.argsort(stable=True)
        x_PD = x_TD.index_select(0, pairs_P // experts_TK.shape[1])
        counts = torch.bincount(experts_P, minlength=len(self.down)).tolist()
        parts: list[Tensor] = []
        begin = 0
        for expert, count in enumerate(counts):
            if count:
                gate_up = self.gate_up[expert].multiply(x_PD[begin : begin + count], None, None, ops)
                parts.append(self.down[expert].multiply(ops.silu_and_mul(gate_up), None, None, ops))
                begin += count
        del x_PD
        return ops.experts.combine(torch.cat(parts).index_select(0, pairs_P.argsort()), weights_TK)


class StackedExperts:
    """All experts in one weight, multiplied by the op table's grouped kernel."""

    __slots__ = ("count", "down", "gate_up")

    def __init__(self, gate_up: LinearWeight, down: LinearWeight, count: int) -> None:
        for weight in (gate_up, down):
            if isinstance(weight, SplitWeight) or (isinstance(weight, PackedWeight) and weight.input_order is not None):
                raise CheckpointError(
                    "The experts of a layer are stored in several formats, or each with an order of its own.",
                    remedy="A GPU multiplies them together, so they have to be alike: use a checkpoint in which they "
                    "are, or --device cpu.",
                )
        self.gate_up = gate_up
        self.down = down
        self.count = count

    def mlp(self, x_TD: Tensor, chosen: tuple[Tensor, Tensor], ops: Ops) -> Tensor:
        assert isinstance(self.gate_up, PackedWeight)
        assert isinstance(self.down, PackedWeight)
        return ops.experts.mlp(ops, x_TD, chosen, self.gate_up.packed, self.down.packed, self.count)
