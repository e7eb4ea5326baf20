"""Weights and caches as the Triton kernels read them, in the GPU's memory."""

from __future__ import annotations

from penstock.kernels.layouts import TorchLayouts


class TritonLayouts(TorchLayouts):
    """The reference's, until an op reads another."""

    __slots__ = ()
