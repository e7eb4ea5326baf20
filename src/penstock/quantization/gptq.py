"""GPTQ: codes of 2, 3, 4 or 8 bits with a scale and a zero point for each group of inputs, packed along the inputs.

    qweight int32 [K * bits / 32, N]    scales [G, N]    qzeros int32 [G, N * bits / 32]    g_idx int32 [K]
    weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n]) with g = g_idx[k]

The first version of the format stores zero points less one (a zero of 0 as the largest code). With act-order
("desc_act") the members of a group lie anywhere: columns are sorted by group at load, and the input is
gathered in that order before it is multiplied.
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
from penstock.quantization.stored_format import SCALE_NAMES, StoredFormat, row_pieces, sorted_order
from penstock.quantization.tensor_source import TensorSource


class GPTQFormat(StoredFormat):
    """Built from the header of the checkpoint: the types of its tensors say which linears are quantised."""

    def __init__(self, dtype: torch.dtype, config: QuantizationConfig, tensor_types: Mapping[str, str]) -> None:
        super().__init__(dtype, tensor_types)
        self._config = config

    def layout(self, name: str, num_columns: int) -> WeightLayout | None:  # noqa: ARG002  the signature is the base's
        if f"{name}.qweight" not in self._types:
            return None
        scales = SCALE_NAMES.get(self._types.get(f"{name}.scales", ""), "f32")
        bits = 8 if self._config.bits == 8 else 4
        return WeightLayout(bits, kernel_group(self._config.group_size), "float", scales, "point")

    def input_order(self, source: TensorSource, name: str, num_columns: int) -> Tensor | None:
        tensor = f"{name}.g_idx"
        return sorted_order(source, tensor, num_columns, self._config.group_size) if tensor in self._types else None

    def pack_rows(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        rows, columns = shape
        bits, size = self._config.bits, self._config.group_size
        groups = -(-columns // (size or columns))
        order = self.input_order(source, name, columns)
        if columns % 32 or rows % 32:
            raise CheckpointError(f"{name} is {rows} x {columns}: GPTQ packs multiples of 32.")
        largest = (1 << bits) - 1
        words_WN = source.stored(f"{name}.qweight", (columns * bits // 32, rows))
        scales_NG = source.tensor(f"{name}.scales", (groups, rows), torch.float32).T
        zeros_GN = source.stored(f"{name}.qzeros", (groups, rows * bits // 32))
        zeros_NG = (
            (unpack_words(zeros_GN.T.contiguous(), bits, rows) + self._config.stored_zero_offset) & largest
        ).float()
        for begin, end in row_pieces(rows, columns):
            codes_RK = unpack_words(words_WN[:, begin:end], bits, columns).T
            codes_RK = codes_RK.contiguous() if order is None else codes_RK[:, order].contiguous()
            ops.pack_parts(
                packed,
                first_row + begin,
                codes_RK,
                spread_groups(scales_NG[begin:end], size, columns),
                spread_groups(zeros_NG[begin:end], size, columns),
            )
        source.release(f"{name}.qweight")
