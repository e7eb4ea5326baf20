"""AWQ ("gemm" order): 4-bit codes with a scale and a zero point for each group of inputs, packed along the outputs.

    qweight int32 [K, N / 8]    scales [G, N]    qzeros int32 [G, N / 8]
    weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n]) with g = k // group size

A word's nibbles, from the lowest, are outputs 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.base.errors import CheckpointError
from penstock.config.quantization import QuantizationConfig
from penstock.kernels.ops import Ops
from penstock.kernels.quantized import QuantizedLinear, WeightLayout
from penstock.quantization.integer_codes import kernel_group, spread_groups, unpack_words
from penstock.quantization.stored_format import SCALE_NAMES, StoredFormat, row_pieces
from penstock.quantization.tensor_source import TensorSource

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of outputs 0 to 7 among the nibbles


class AWQFormat(StoredFormat):
    """Built from the header of the checkpoint: the types of its tensors say which linears are quantised."""

    def __init__(self, dtype: torch.dtype, config: QuantizationConfig, tensor_types: Mapping[str, str]) -> None:
        super().__init__(dtype, tensor_types)
        self._config = config

    def layout(self, name: str, num_columns: int) -> WeightLayout | None:  # noqa: ARG002  the signature is the base's
        if f"{name}.qweight" not in self._types:
            return None
        scales = SCALE_NAMES.get(self._types.get(f"{name}.scales", ""), "f32")
        return WeightLayout(4, kernel_group(self._config.group_size), "float", scales, "point")

    def pack_rows(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        rows, columns = shape
        size = self._config.group_size
        groups = -(-columns // (size or columns))
        if rows % 8:
            raise CheckpointError(f"{name} has {rows} outputs: AWQ packs multiples of 8.")
        words_KW = source.stored(f"{name}.qweight", (columns, rows // 8))
        zeros_NG = _unpack(source.stored(f"{name}.qzeros", (groups, rows // 8))).float()
        scales_NG = source.tensor(f"{name}.scales", (groups, rows), torch.float32).T
        for begin, end in row_pieces(rows, columns):
            ops.pack_parts(
                packed,
                first_row + begin,
                _unpack(words_KW[:, begin // 8 : -(-end // 8)])[: end - begin].contiguous(),
                spread_groups(scales_NG[begin:end], size, columns),
                spread_groups(zeros_NG[begin:end], size, columns),
            )
        source.release(f"{name}.qweight")


def _unpack(words_KW: Tensor) -> Tensor:
    """int32 [K, N / 8] -> codes uint8 [N, K]."""
    nibbles_NK = unpack_words(words_KW.T.contiguous(), 4, 8 * words_KW.shape[1])
    return nibbles_NK.view(-1, 8, words_KW.shape[0])[:, list(_PLACES)].flatten(0, 1)
