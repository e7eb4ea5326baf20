"""Mixtures of experts in torch: which experts a token meets, and the weighted sum of what they give.

Only additions, multiplications and torch's ops along a row are used: each gives a row the same bits among any others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from penstock.kernels.expert_stack import ExpertStack
    from penstock.kernels.ops import Ops
    from penstock.kernels.packed import PackedLinear
    from penstock.kernels.quantized import QuantizedLinear


class ReferenceExperts:
    """See ExpertOps in kernels/ops.py."""

    __slots__ = ("_ops",)

    def __init__(self, ops: Ops) -> None:
        """ops: what experts are computed with."""
        self._ops = ops

    def choose(self, logits_TE: Tensor, top_k: int, *, is_renormalized: bool) -> tuple[Tensor, Tensor]:
        probabilities_TE = torch.softmax(logits_TE.float(), 1)
        sorted_TE, experts_TE = probabilities_TE.sort(stable=True, dim=1, descending=True)
        weights_TK = sorted_TE[:, :top_k].contiguous()
        if is_renormalized:
            total_T = weights_TK[:, 0]
            for place in range(1, top_k):
                total_T = total_T + weights_TK[:, place]
            weights_TK /= total_T[:, None]
        return experts_TE[:, :top_k].int(), weights_TK

    def combine(self, pairs_PN: Tensor, weights_TK: Tensor) -> Tensor:
        tokens, top_k = weights_TK.shape
        pairs_TKN = pairs_PN.view(tokens, top_k, -1)
        total_TN = pairs_TKN[:, 0].float() * weights_TK[:, :1]
        for place in range(1, top_k):
            total_TN += pairs_TKN[:, place].float() * weights_TK[:, place : place + 1]
        return total_TN.to(pairs_PN.dtype)

    def mlp(
        self,
        x_TD: Tensor,
        chosen: tuple[Tensor, Tensor],
        gate_up: PackedLinear | QuantizedLinear,
        down: PackedLinear | QuantizedLinear,
        num_experts: int,
    ) -> Tensor:
        """Every expert is computed for every token, and those that were chosen are taken."""
        experts_TK, weights_TK = chosen
        experts_P = experts_TK.flatten().long()
        pairs_P = torch.arange(len(experts_P), device=x_TD.device)
        by_expert = self._ops.linear(x_TD, gate_up).view(len(x_TD), num_experts, -1)
        hidden_PI = self._ops.silu_and_mul(by_expert[pairs_P // experts_TK.shape[1], experts_P])
        by_expert = self._ops.linear(hidden_PI, down).view(len(hidden_PI), num_experts, -1)
        return self.combine(by_expert[pairs_P, experts_P], weights_TK)

    def mlp_of_each(
        self, x_TD: Tensor, chosen: tuple[Tensor, Tensor], gate_up: ExpertStack, down: ExpertStack
    ) -> Tensor:
        ops = self._ops

        def block(expert: int, rows_RD: Tensor) -> Tensor:
            return ops.linear(ops.silu_and_mul(ops.linear(rows_RD, gate_up.weights[expert])), down.weights[expert])

        return self.combine(expert_by_expert(x_TD, chosen[0], len(down.weights), block), chosen[1])

    def add_shared(self, mixed_TD: Tensor, logits_T1: Tensor, shared_TD: Tensor) -> Tensor:
        # torch.sigmoid gives the last rows of a CPU tensor other bits than the first; along a row, softmax does not.
        shares_T1 = torch.softmax(torch.cat([logits_T1, torch.zeros_like(logits_T1)], 1), 1)[:, :1]
        return (mixed_TD.float() + shares_T1 * shared_TD.float()).to(mixed_TD.dtype)


def expert_by_expert(
    x_TD: Tensor, experts_TK: Tensor, num_experts: int, block: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """block(expert, its rows of x) of all pairs [P, N], in the tokens' order. An expert without tokens is left out."""
    experts_P = experts_TK.flatten()
    pairs_P = experts_P.argsort(stable=True)
    x_PD = x_TD.index_select(0, pairs_P // experts_TK.shape[1])
    parts: list[Tensor] = []
    begin = 0
    for expert, count in enumerate(torch.bincount(experts_P, minlength=num_experts).tolist()):
        if count:
            parts.append(block(expert, x_PD[begin : begin + count]))
            begin += count
    del x_PD
    return torch.cat(parts).index_select(0, pairs_P.argsort())
