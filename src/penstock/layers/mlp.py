"""Feed-forward blocks: the gated down(silu(gate(x)) * up(x)), and the older down(gelu(up(x)))."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.kernels.rounded import ActivationForm, Activations, RoundedActivations
from penstock.layers.linear import Linear
from penstock.quantization import WholeStepWeight

# The inner activations are the widest of a step. More tokens than this go through in pieces: the memory stays bounded
# and stays with the allocator (it returns larger buffers to the system, and each new one costs its page faults again).
MAX_TOKENS_AT_ONCE: Final = 512


def in_pieces(block: Callable[[Tensor], Tensor], x_TD: Tensor, first: Linear) -> Tensor:
    """block(x), of at most MAX_TOKENS_AT_ONCE tokens at a time; of all on a GPU, which wants large matrices, and where
    the block's first linear wants to see them all."""
    is_whole = not x_TD.is_cpu or isinstance(first.weight, WholeStepWeight)
    num_tokens = x_TD.shape[0]
    if num_tokens <= MAX_TOKENS_AT_ONCE or is_whole:
        return block(x_TD)
    begins = range(0, num_tokens, MAX_TOKENS_AT_ONCE)
    return torch.cat([block(x_TD[begin : begin + MAX_TOKENS_AT_ONCE]) for begin in begins])


class GatedMLP:
    """gate_up: [2I, D], gate's rows first. down: [D, I]."""

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x_TD: Activations, ops: Ops) -> Tensor:
        if isinstance(x_TD, RoundedActivations):
            return self._block(x_TD, ops)
        return in_pieces(lambda piece_TD: self._block(piece_TD, ops), x_TD, self.gate_up)

    def form(self, ops: Ops) -> ActivationForm | None:
        return self.gate_up.form(ops)

    def _block(self, x_TD: Activations, ops: Ops) -> Tensor:
        return self.down(self._activated(x_TD, ops), ops)

    def _activated(self, x_TD: Activations, ops: Ops) -> Activations:
        """As `down` takes it. Nothing holds the widest of all activations any longer."""
        form = self.down.form(ops)
        if form is None:
            return self.gate_up.gated(x_TD, ops)
        assert ops.rounded is not None
        return ops.rounded.silu_and_mul(self.gate_up(x_TD, ops), form)


class GeluMLP:
    """up: [I, D]. down: [D, I]."""

    __slots__ = ("down", "up")

    def __init__(self, up: Linear, down: Linear) -> None:
        self.up = up
        self.down = down

    def __call__(self, x_TD: Tensor, ops: Ops) -> Tensor:
        return in_pieces(lambda piece_TD: self.down(ops.gelu(self.up(piece_TD, ops)), ops), x_TD, self.up)
