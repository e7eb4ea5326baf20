"""FP8: weights of eight-bit floats with a scale for the tensor, each output, or each block of outputs and inputs.

    weight F8_E4M3 or F8_E5M2 [N, K]
    weight_scale [], [1], [N] or [N, 1]; with blocks: weight_scale_inv (or weight_scale) [N / block, K / block]
    weight[n, k] = scale * code            ("inv" is the scale all the same)

Activations stay as they are: what is stored for them (input_scale) is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from penstock.base.errors import CheckpointError
from penstock.kernels.ops import Ops
from penstock.kernels.quantized import QuantizedLinear, WeightLayout, fp8
from penstock.quantization.integer_codes import kernel_group, spread_groups
from penstock.quantization.stored_format import StoredFormat, row_pieces
from penstock.quantization.tensor_source import TensorSource

FP8_TYPES: Final = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
_SCALES: Final = ("weight_scale_inv", "weight_scale")
IGNORED_SUFFIXES: Final = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".input_scale_ub")


class FP8Format(StoredFormat):
    """block: outputs and inputs that share a scale; (0, 0): there are no blocks. tensor_types: by tensor name."""

    def __init__(self, dtype: torch.dtype, block: tuple[int, int], tensor_types: Mapping[str, str]) -> None:
        super().__init__(dtype, tensor_types)
        self._block = block

    def ignores(self, tensor: str) -> bool:
        return tensor.endswith(IGNORED_SUFFIXES)

    def layout(self, name: str, num_columns: int) -> WeightLayout | None:  # noqa: ARG002  the signature is the base's
        kind = self._types.get(f"{name}.weight", "")
        return fp8(FP8_TYPES[kind], kernel_group(self._block[1])) if kind in FP8_TYPES else None

    def pack_rows(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        tensor = f"{name}.weight"
        scales_NG = self._scales(source, name, shape)
        for begin, end in row_pieces(*shape):
            codes_RK = source.stored(tensor, shape, begin, end).view(torch.uint8)
            scales_RG = spread_groups(scales_NG[begin:end], self._block[1], shape[1])
            ops.pack_parts(packed, first_row + begin, codes_RK, scales_RG)
            source.release(tensor, begin, end)

    def _scales(self, source: TensorSource, name: str, shape: tuple[int, int]) -> Tensor:
        """A scale for each output and block of inputs, float32 [N, G]."""
        tensor = next((f"{name}.{suffix}" for suffix in _SCALES if f"{name}.{suffix}" in self._types), None)
        if tensor is None:
            raise CheckpointError(f"{name}.weight is FP8, and there is no {name}.weight_scale.")
        if self._block[0]:
            rows, columns = (-(-size // side) for size, side in zip(shape, self._block, strict=True))
            scales = source.tensor(tensor, (rows, columns), torch.float32)
            return scales.repeat_interleave(self._block[0], dim=0)[: shape[0]]
        return row_scales(source, tensor, shape[0])


def row_scales(source: TensorSource, tensor: str, num_rows: int) -> Tensor:
    """One scale, or one a row, in any of the shapes these come in -> float32 [N, 1]."""
    stored = source.shape(tensor) or ()
    if stored not in ((), (1,), (1, 1), (num_rows,), (num_rows, 1)):
        raise CheckpointError(f"{tensor} has the shape {list(stored)}, which is neither one scale nor {num_rows}.")
    return source.tensor(tensor, stored, torch.float32).reshape(-1, 1).expand(num_rows, 1)
