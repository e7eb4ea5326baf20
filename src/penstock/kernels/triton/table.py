"""The op table of a GPU: Triton kernels, and torch's own op where that is the right implementation."""

from __future__ import annotations

from penstock.kernels.layouts import Layouts
from penstock.kernels.reference.table import ReferenceOps


class TritonOps(ReferenceOps):
    """The references, but for what is overridden here."""

    __slots__ = ()

    def __init__(self, num_threads: int, layouts: Layouts) -> None:
        super().__init__(num_threads, layouts)
        self.kind = "triton"
