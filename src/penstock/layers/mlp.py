"""The gated feed-forward block: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.layers.linear import Linear

# The inner activations are the widest of a step. More tokens than this go through in pieces: the memory stays bounded
# and stays with the allocator (it returns larger buffers to the system, and each new one costs its page faults again).
MAX_TOKENS_AT_ONCE: Final = 512


class GatedMLP:
    """gate_up: [2I, D], gate's rows first. down: [D, I]."""

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x_TD: Tensor, ops: Ops) -> Tensor:
        num_tokens = x_TD.shape[0]
        if num_tokens <= MAX_TOKENS_AT_ONCE:
            return self._piece(x_TD, ops)
        begins = range(0, num_tokens, MAX_TOKENS_AT_ONCE)
        return torch.cat([self._piece(x_TD[begin : begin + MAX_TOKENS_AT_ONCE], ops) for begin in begins])

    def _piece(self, x_TD: Tensor, ops: Ops) -> Tensor:
        return self.down(ops.silu_and_mul(self.gate_up(x_TD, ops)), ops)
