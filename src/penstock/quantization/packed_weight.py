"""Loaded weights: one packed matrix, or several that are multiplied side by side.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.kernels.packed import PackedLinear
from penstock.kernels.quantized import QuantizedLinear
from penstock.quantization.linear_format import LinearWeight

Packed = PackedLinear | QuantizedLinear


class PackedWeight:
    """A weight in a packed layout of ops.linear.

    input_order: of the inputs' columns where the format sorted them (GPTQ's act-order), else None.
    """

    __slots__ = ("input_order", "num_columns", "num_rows", "packed")

    def __init__(self, packed: Packed, input_order: Tensor | None = None) -> None:
        self.packed = packed
        self.num_rows = packed.n
        self.num_columns = packed.k
        self.input_order = input_order

    def multiply(self, x_TK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype | None, ops: Ops) -> Tensor:
        if self.input_order is not None:
            x_TK = x_TK.index_select(1, self.input_order)
        return ops.linear(x_TK, self.packed, bias_N, out_dtype)

    def gather(self, ids_T: Tensor, ops: Ops) -> Tensor:
        assert self.input_order is None
        return ops.embedding(ids_T, self.packed)


class SplitWeight:
    """A fused linear whose parts are of different formats, as in GGUF's mixed files: each is multiplied by itself."""

    __slots__ = ("num_columns", "num_rows", "parts")

    def __init__(self, parts: Sequence[PackedWeight]) -> None:
        self.parts = list(parts)
        self.num_rows = sum(part.num_rows for part in parts)
        self.num_columns = parts[0].num_columns

    def multiply(self, x_TK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype | None, ops: Ops) -> Tensor:
        sizes = [part.num_rows for part in self.parts]
        biases = [None] * len(sizes) if bias_N is None else torch.split(bias_N, sizes)
        outputs = [part.multiply(x_TK, bias, out_dtype, ops) for part, bias in zip(self.parts, biases, strict=True)]
        return torch.cat(outputs, 1)


def packed_parts(weight: LinearWeight) -> list[Packed]:
    """The matrices that a loaded weight is made of; none of one that was only counted."""
    parts = weight.parts if isinstance(weight, SplitWeight) else [weight]
    return [part.packed for part in parts if isinstance(part, PackedWeight)]
