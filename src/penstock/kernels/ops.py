"""The op table: every operation a model's forward pass is made of, with its signature and meaning.

`load` gives one `Ops` object, which is passed explicitly to whatever computes. Its implementation is either "native"
(csrc/, through penstock._native) or "reference" (torch; always right, and what the native ones are tested against).
Shapes: T tokens of the step, K inputs, N outputs, H query heads, G key/value heads, D head size, V vocabulary, R rows.
Activations are contiguous and of the model's dtype, bfloat16 or float32, unless said otherwise; sums are in float32.
A row's result never depends on the other rows.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from penstock.base.errors import ConfigError
from penstock.kernels.packed import PackedLinear, empty_packed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Ops(ABC):
    """One implementation of every op. kind: "native" or "reference". isa: the instruction set of the native kernels."""

    __slots__ = ("isa", "kind", "num_threads")

    def __init__(self, kind: str, isa: str, num_threads: int) -> None:
        self.kind = kind
        self.isa = isa
        self.num_threads = num_threads

    # ---- linear, embedding (kernels/native/linear.py, kernels/reference/linear.py, csrc/ops/linear.cpp)

    @abstractmethod
    def pack_into(self, packed: PackedLinear, first_row: int, source: Tensor) -> None:
        """Convert source [rows, K] (float32, bfloat16 or float16; may be a mapped file's) into rows of `packed`."""

    def pack_linear(self, weights: Sequence[Tensor], dtype: torch.dtype) -> PackedLinear:
        """Pack weights [N_i, K], stacked by rows (fused q, k, v; gate, up), as one [sum N_i, K] of `dtype`."""
        packed = empty_packed(sum(weight.shape[0] for weight in weights), weights[0].shape[1], dtype)
        first_row = 0
        for weight in weights:
            self.pack_into(packed, first_row, weight)
            first_row += weight.shape[0]
        return packed

    @abstractmethod
    def linear(
        self, x_TK: Tensor, weight: PackedLinear, bias_N: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """x @ weight.T + bias -> [T, N]. The bias is added in float32. out_dtype: x's (default) or float32."""

    @abstractmethod
    def embedding(self, ids_T: Tensor, weight: PackedLinear) -> Tensor:
        """Rows of a packed [V, K] -> [T, K]. ids: int64, each in [0, V)."""


def load(kind: str, num_threads: int, isa: str | None = None) -> Ops:
    """Build the op table. isa: force an instruction set (default: PENSTOCK_ISA, else the best that works here).

    ConfigError: the native core is missing, or the forced instruction set does not work on this machine.
    """
    assert num_threads >= 1, num_threads
    if kind == "reference":
        from penstock.kernels.reference.table import ReferenceOps

        return ReferenceOps(num_threads)
    assert kind == "native", kind
    try:
        from penstock import _native
    except ImportError as error:
        raise ConfigError(
            f"The native core cannot be loaded ({error}).",
            remedy="Build it with `pip install .`, or choose the reference kernels.",
        ) from error
    from penstock.kernels.native.table import NativeOps

    try:
        kernels = _native.kernels(os.environ.get("PENSTOCK_ISA", "") if isa is None else isa)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"PENSTOCK_ISA: {error}.", remedy="Unset it to use the best one that works.") from error
    return NativeOps(kernels, num_threads)
