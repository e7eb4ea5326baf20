"""Weights as they are: bf16 or f32 kernels over bf16, f16 or f32 checkpoints.

A checkpoint in another dtype than the model's is converted while it is packed, tile by tile.
"""

from __future__ import annotations

from penstock.kernels.quantized import WeightLayout
from penstock.quantization.stored_format import StoredFormat


class UnquantizedFormat(StoredFormat):
    """dtype: of the model (bfloat16 or float32), whatever the checkpoint holds."""

    def layout(self, name: str, num_columns: int) -> WeightLayout | None:  # noqa: ARG002  the signature is the base's
        return None

    def pack_rows(self, *_: object) -> None:
        raise AssertionError("no linear of this format is quantised")
