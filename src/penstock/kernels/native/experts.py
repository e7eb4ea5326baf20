"""Mixtures of experts: routing, all experts of a step in one call, and the expert of all tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from penstock.kernels.native.dtypes import DTYPE_CODE
from penstock.kernels.native.quantized import layout_numbers
from penstock.kernels.reference.experts import ReferenceExperts

if TYPE_CHECKING:
    from torch import Tensor

    from penstock._native import Kernels
    from penstock.kernels.expert_stack import ExpertStack
    from penstock.kernels.ops import Ops

MAX_EXPERTS: Final = 1024  # csrc/ops/experts.h


class NativeExperts(ReferenceExperts):
    """See kernels/ops.py: ExpertOps."""

    __slots__ = ("_kernels", "_num_threads")

    def __init__(self, ops: Ops, kernels: Kernels, num_threads: int) -> None:
        super().__init__(ops)
        self._kernels = kernels
        self._num_threads = num_threads

    def choose(self, logits_TE: Tensor, top_k: int, *, is_renormalized: bool) -> tuple[Tensor, Tensor]:
        tokens, count = logits_TE.shape
        assert logits_TE.dtype is torch.float32 and logits_TE.is_contiguous(), (logits_TE.dtype, logits_TE.stride())
        assert 0 < top_k <= count <= MAX_EXPERTS, (top_k, count)
        experts_TK = torch.empty((tokens, top_k), dtype=torch.int32)
        weights_TK = torch.empty((tokens, top_k), dtype=torch.float32)
        self._kernels.choose_experts(
            logits_TE.data_ptr(), experts_TK.data_ptr(), weights_TK.data_ptr(), tokens, count, top_k, is_renormalized,
            self._num_threads,
        )  # fmt: skip
        return experts_TK, weights_TK

    def mlp_of_each(
        self, x_TD: Tensor, chosen: tuple[Tensor, Tensor], gate_up: ExpertStack, down: ExpertStack
    ) -> Tensor:
        experts_TK, weights_TK = chosen
        tokens, hidden = x_TD.shape
        dtype, count, top_k = x_TD.dtype, len(down.weights), experts_TK.shape[1]
        assert experts_TK.dtype is torch.int32 and weights_TK.dtype is torch.float32
        assert experts_TK.is_contiguous() and weights_TK.is_contiguous() and x_TD.is_contiguous()
        assert weights_TK.shape == experts_TK.shape == (tokens, top_k), (experts_TK.shape, weights_TK.shape)
        assert len(gate_up.weights) == count <= MAX_EXPERTS, (len(gate_up.weights), count)
        assert gate_up.k == down.n == hidden and gate_up.n == 2 * down.k, (gate_up.n, gate_up.k, down.n, down.k)
        assert gate_up.dtype is down.dtype is dtype, (gate_up.dtype, down.dtype, dtype)
        out = torch.empty_like(x_TD)
        self._kernels.experts_mlp(
            layout_numbers(gate_up.layout, dtype), gate_up.addresses.data_ptr(), layout_numbers(down.layout, dtype),
            down.addresses.data_ptr(), x_TD.data_ptr(), experts_TK.data_ptr(), weights_TK.data_ptr(), out.data_ptr(),
            tokens, count, top_k, hidden, down.k, DTYPE_CODE[dtype], self._num_threads,
        )  # fmt: skip
        return out

    def add_shared(self, mixed_TD: Tensor, logits_T1: Tensor, shared_TD: Tensor) -> Tensor:
        dtype, (tokens, hidden) = mixed_TD.dtype, mixed_TD.shape
        assert shared_TD.dtype is dtype and logits_T1.dtype is torch.float32, (shared_TD.dtype, logits_T1.dtype)
        assert mixed_TD.shape == shared_TD.shape and logits_T1.shape == (tokens, 1), logits_T1.shape
        assert mixed_TD.is_contiguous() and shared_TD.is_contiguous() and logits_T1.is_contiguous()
        out = torch.empty_like(mixed_TD)
        self._kernels.add_shared_expert(
            mixed_TD.data_ptr(), logits_T1.data_ptr(), shared_TD.data_ptr(), out.data_ptr(), tokens, hidden,
            DTYPE_CODE[dtype], self._num_threads,
        )  # fmt: skip
        return out
