"""A checkpoint rounded further than it says, because the user asked for it.

What a quantised checkpoint left in floats (its head, single linears) is rounded while it loads, as a float checkpoint's
linears are. What is quantised stays as it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.kernels.quantized import QuantizedLinear, WeightLayout
from penstock.quantization.stored_format import StoredFormat
from penstock.quantization.tensor_source import TensorSource


class RoundedFormat(StoredFormat):
    """stored: the checkpoint's own format. floats: of what that leaves in floats."""

    def __init__(self, stored: StoredFormat, floats: StoredFormat) -> None:
        super().__init__(stored.dtype)
        self._stored = stored
        self._floats = floats

    def ignores(self, tensor: str) -> bool:
        return self._stored.ignores(tensor)

    def layout(self, name: str, num_columns: int) -> WeightLayout | None:
        return self._stored.layout(name, num_columns) or self._floats.layout(name, num_columns)

    def input_order(self, source: TensorSource, name: str, num_columns: int) -> Tensor | None:
        return self._stored.input_order(source, name, num_columns)

    def pack_rows(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        chosen = self._floats if self._stored.layout(name, shape[1]) is None else self._stored
        chosen.pack_rows(source, name, shape, packed, first_row, ops)

    def rounds_any(self, matrices: Mapping[str, int]) -> bool:
        """Whether one of the checkpoint's matrices would stay in floats otherwise. matrices: inputs by name."""
        return any(
            self._stored.layout(name, num_columns) is None and self.layout(name, num_columns) is not None
            for name, num_columns in matrices.items()
        )
