"""A mixture's experts as they are kept: each by itself on a host, below each other in one matrix on a GPU.

A host multiplies those that have tokens. A GPU may not ask which these are: one kernel serves all.
Shapes: T tokens, K experts of a token, P = T K pairs of a token and one of its experts, D hidden, I inner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from penstock.base.errors import CheckpointError
from penstock.kernels.expert_stack import ExpertStack
from penstock.kernels.ops import Ops
from penstock.kernels.reference.experts import expert_by_expert
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
    """Weights of one expert after another. Each is read once for all its tokens; a row's bits are its own.

    Those that are alike are multiplied by one op; others, in formats or orders of their own, one by one.
    """

    __slots__ = ("_stacks", "down", "gate_up")

    def __init__(self, gate_up: Sequence[LinearWeight], down: Sequence[LinearWeight]) -> None:
        self.gate_up = list(gate_up)
        self.down = list(down)
        stacks = _stack(gate_up), _stack(down)
        self._stacks = None if stacks[0] is None or stacks[1] is None else (stacks[0], stacks[1])

    def mlp(self, x_TD: Tensor, chosen: tuple[Tensor, Tensor], ops: Ops) -> Tensor:
        if self._stacks is not None:
            return ops.experts.mlp_of_each(x_TD, chosen, *self._stacks)

        def block(expert: int, rows_RD: Tensor) -> Tensor:
            inner_RI = ops.silu_and_mul(self.gate_up[expert].multiply(rows_RD, None, None, ops))
            return self.down[expert].multiply(inner_RI, None, None, ops)

        return ops.experts.combine(expert_by_expert(x_TD, chosen[0], len(self.down), block), chosen[1])


def _stack(weights: Sequence[LinearWeight]) -> ExpertStack | None:
    plain = [each.packed for each in weights if isinstance(each, PackedWeight) and each.input_order is None]
    return ExpertStack.of(plain) if len(plain) == len(weights) else None


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
        return ops.experts.mlp(x_TD, chosen, self.gate_up.packed, self.down.packed, self.count)
