"""The op table filled with the torch references."""

from __future__ import annotations

from penstock.kernels.ops import Ops
from penstock.kernels.reference import linear as linear_family


class ReferenceOps(Ops):
    """Every op in plain torch."""

    __slots__ = ()

    def __init__(self, num_threads: int) -> None:
        super().__init__("reference", "torch", num_threads)

    pack_into = staticmethod(linear_family.pack_into)
    linear = staticmethod(linear_family.linear)
    embedding = staticmethod(linear_family.embedding)
