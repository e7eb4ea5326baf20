"""The search for a group's scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from penstock._native import Kernels

_GROUP_SIZES = (16, 32)


class NativeScaleSearch:
    """See kernels/ops.py: ScaleSearch. The same bits on any processor, in any number of threads."""

    __slots__ = ("_kernels", "_num_threads")

    def __init__(self, kernels: Kernels, num_threads: int) -> None:
        self._kernels = kernels
        self._num_threads = num_threads

    def affine(self, x_NGE: Tensor, weight_NGE: Tensor, top: int) -> tuple[Tensor, Tensor]:
        scales, minimums = _outputs(x_NGE, weight_NGE), _outputs(x_NGE, weight_NGE)
        self._kernels.search_affine_scales(
            x_NGE.data_ptr(), weight_NGE.data_ptr(), scales.data_ptr(), minimums.data_ptr(), scales.numel(),
            x_NGE.shape[2], top, self._num_threads,
        )  # fmt: skip
        return scales, minimums

    def symmetric(self, x_NGE: Tensor, weight_NGE: Tensor, half: int) -> Tensor:
        scales = _outputs(x_NGE, weight_NGE)
        self._kernels.search_symmetric_scales(
            x_NGE.data_ptr(), weight_NGE.data_ptr(), scales.data_ptr(), scales.numel(), x_NGE.shape[2], half,
            self._num_threads,
        )  # fmt: skip
        return scales


def _outputs(x_NGE: Tensor, weight_NGE: Tensor) -> Tensor:
    assert x_NGE.dtype is weight_NGE.dtype is torch.float32, (x_NGE.dtype, weight_NGE.dtype)
    assert x_NGE.is_contiguous() and weight_NGE.is_contiguous() and x_NGE.shape == weight_NGE.shape
    assert x_NGE.shape[2] in _GROUP_SIZES, x_NGE.shape
    return torch.empty(x_NGE.shape[:2])
