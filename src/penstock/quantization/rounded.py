"""A checkpoint rounded further than it says, because the user asked for it.

What a quantised checkpoint left in floats (its head, single linears) is rounded while it loads, as a float checkpoint's
linears are; and weights that are integers are multiplied with activations of 8 bits instead of 16. What is quantised
stays as it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.kernels.quantized import QuantizedLinear, WeightLayout, with_int8_activations
from penstock.quantization.stored_format import StoredFormat
from penstock.quantization.tensor_source import TensorSource


class RoundedFormat(StoredFormat):
    """stored: the checkpoint's own format. floats: of what that leaves in floats, or None: it stays so.

    rounds_activations: to 8 bits by 256 inputs, where weights are integers.
    """

    def __init__(
        self, stored: StoredFormat, floats: StoredFormat | None = None, *, rounds_activations: bool = False
    ) -> None:
        super().__init__(stored.dtype)
        self._stored = stored
        self._floats = floats
        self._rounds_activations = rounds_activations

    def ignores(self, tensor: str) -> bool:
        return self._stored.ignores(tensor)

    def layout(self, name: str, num_columns: int) -> WeightLayout | None:
        layout = self._stored.layout(name, num_columns)
        if layout is None:
            return self._floats.layout(name, num_columns) if self._floats is not None else None
        return with_int8_activations(layout) if self._rounds_activations else layout

    def input_order(self, source: TensorSource, name: str, num_columns: int) -> Tensor | None:
        return self._stored.input_order(source, name, num_columns)

    def pack_rows(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        chosen = self._stored
        if self._floats is not None and self._stored.layout(name, shape[1]) is None:
            chosen = self._floats
        chosen.pack_rows(source, name, shape, packed, first_row, ops)

    def report_widened(self) -> None:
        if self._floats is None:
            self._stored.report_widened()

    def rounds_any(self, matrices: Mapping[str, int]) -> bool:
        """Whether one of the checkpoint's matrices would stay in floats otherwise. matrices: inputs by name."""
        return any(
            self._stored.layout(name, num_columns) is None and self.layout(name, num_columns) is not None
            for name, num_columns in matrices.items()
        )
