"""A mixture of experts in place of a feed-forward block: each token goes through the few that its router names.

Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.kernels.rounded import Activations
from penstock.layers.linear import Linear
from penstock.layers.mlp import GatedMLP, in_pieces
from penstock.quantization import ExpertWeights


class SharedExpert:
    """A block that every token goes through, weighted by the sigmoid of `router` [1, D] (Qwen2-MoE)."""

    __slots__ = ("block", "router")

    def __init__(self, block: GatedMLP, router: Linear) -> None:
        self.block = block
        self.router = router

    def add_to(self, mixed_TD: Tensor, x_TD: Tensor, ops: Ops) -> Tensor:
        """mixed + sigmoid(router(x)) * block(x), rounded once."""
        logits_T1 = self.router(x_TD, ops, torch.float32)
        return ops.experts.add_shared(mixed_TD, logits_T1, self.block(x_TD, ops))


class ExpertsMLP:
    """router: [experts, D]. top_k: experts of a token. is_renormalized: their weights add up to one."""

    __slots__ = ("experts", "is_renormalized", "router", "shared", "top_k")

    def __init__(
        self,
        router: Linear,
        experts: ExpertWeights,
        top_k: int,
        *,
        is_renormalized: bool,
        shared: SharedExpert | None = None,
    ) -> None:
        self.router = router
        self.experts = experts
        self.top_k = top_k
        self.is_renormalized = is_renormalized
        self.shared = shared

    def form(self, ops: Ops) -> None:
        """The router takes x as it is."""

    def __call__(self, x_TD: Activations, ops: Ops) -> Tensor:
        assert isinstance(x_TD, Tensor), type(x_TD)
        mixed_TD = in_pieces(lambda piece_TD: self._mix(piece_TD, ops), x_TD, self.router)
        return mixed_TD if self.shared is None else self.shared.add_to(mixed_TD, x_TD, ops)

    def _mix(self, x_TD: Tensor, ops: Ops) -> Tensor:
        logits_TE = self.router(x_TD, ops, torch.float32)
        chosen = ops.experts.choose(logits_TE, self.top_k, is_renormalized=self.is_renormalized)
        return self.experts.mlp(x_TD, chosen, ops)
