"""What a weight format has to say to be one: how linears are stored, repacked and multiplied.

To add a format: a file here with a StoredFormat (stored_format.py makes it a LinearFormat), and a line where the runner
chooses the format. Layers and models know these protocols only; a format knows the tensors below a linear's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from penstock.kernels.layouts import Layouts
from penstock.kernels.ops import Ops
from penstock.quantization.tensor_source import TensorSource


class LinearWeight(Protocol):
    """The weight [num_rows, num_columns] of one (possibly fused) linear, in the layout its kernel reads."""

    num_rows: int
    num_columns: int

    def multiply(self, x_TK: Tensor, bias_N: Tensor | None, out_dtype: torch.dtype | None, ops: Ops) -> Tensor:
        """x @ weight.T + bias -> [T, num_rows] of `out_dtype` (None: of x's)."""
        ...


class WholeStepWeight:
    """A LinearWeight that is to see all tokens of a step at once: blocks do not cut them into pieces for it."""


class EmbeddingWeight(LinearWeight, Protocol):
    """A weight that can also be read by rows: an embedding, which a tied output head multiplies too."""

    def gather(self, ids_T: Tensor, ops: Ops) -> Tensor:
        """Rows `ids` -> [T, num_columns]."""
        ...


class LinearFormat(Protocol):
    """How a checkpoint's linears become LinearWeights."""

    def load_linear(
        self, source: TensorSource, names: Sequence[str], num_rows: Sequence[int], num_columns: int, ops: Ops
    ) -> LinearWeight:
        """The linears `names` (without ".weight" or other suffixes), fused by stacking their rows."""
        ...

    def load_embedding(
        self, source: TensorSource, name: str, num_rows: int, num_columns: int, ops: Ops
    ) -> EmbeddingWeight:
        """The embedding `name` (without suffix)."""
        ...

    def linear_nbytes(self, names: Sequence[str], num_rows: Sequence[int], num_columns: int, layouts: Layouts) -> int:
        """Bytes that the loaded linears take: for the memory plan, before anything is read."""
        ...
