"""Float checkpoints quantised while they load: a piece of rows at a time, so the float weights are never all there.

The embedding stays as it is unless the output head is tied to it, when it is the largest linear of all.
"""

from __future__ import annotations

from typing import Final

import torch

from penstock.kernels.ops import Ops
from penstock.kernels.quantized import INT4, INT8_CHANNEL, QuantizedLinear, WeightLayout
from penstock.quantization.stored_format import StoredFormat, row_pieces
from penstock.quantization.tensor_source import TensorSource

LAYOUTS: Final = {"int8": INT8_CHANNEL, "int4": INT4}


class OnlineFormat(StoredFormat):
    """kind: a key of LAYOUTS. keep: linears that stay floats, by name."""

    def __init__(self, dtype: torch.dtype, kind: str, keep: frozenset[str] = frozenset()) -> None:
        super().__init__(dtype)
        self._layout = LAYOUTS[kind]
        self._keep = keep

    def layout(self, name: str, num_columns: int) -> WeightLayout | None:  # noqa: ARG002  the signature is the base's
        return None if name in self._keep else self._layout

    def pack_rows(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        tensor = f"{name}.weight"
        for begin, end in row_pieces(*shape):
            ops.quantize_into(packed, first_row + begin, source.rows(tensor, shape, begin, end))
            source.release(tensor, begin, end)
