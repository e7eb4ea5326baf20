"""compressed-tensors (LLM Compressor's format): several ways to store a linear, told apart by their tensors.

int-quantized    weight I8 [N, K]; weight_scale [N, 1]; with int8 activations (W8A8) or without
pack-quantized   weight_packed int32 [N, K * bits / 32] of 4 or 8 bits, code = q + 2 ** (bits - 1);
                 weight_scale [N, G]; weight_zero_point int32 [N * bits / 32, G]; weight_g_idx int32 [K];
                 weight_shape, the shape
float-quantized  weight F8 [N, K] with its scales (fp8.py)
mxfp4-pack       weight_packed U8 [N, K / 2], the lower nibble first; weight_scale U8 [N, K / 32], exponents
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.base.errors import CheckpointError
from penstock.config.quantization import QuantizationConfig
from penstock.kernels.ops import Ops
from penstock.kernels.quantized import W8A8, QuantizedLinear, WeightLayout
from penstock.quantization.fp8 import FP8_TYPES, FP8Format, row_scales
from penstock.quantization.integer_codes import kernel_group, spread_groups, unpack_words
from penstock.quantization.stored_format import SCALE_NAMES, StoredFormat, row_pieces, sorted_order
from penstock.quantization.tensor_source import TensorSource

_MXFP4 = WeightLayout(4, 32, "int8", "bf16", values="mxfp4")
_MXFP4_GROUP = 32


class CompressedTensorsFormat(StoredFormat):
    """Built from the header of the checkpoint: the types of its tensors say which linears are quantised."""

    def __init__(self, dtype: torch.dtype, config: QuantizationConfig, tensor_types: Mapping[str, str]) -> None:
        super().__init__(dtype, tensor_types)
        self._config = config
        self._floats = FP8Format(dtype, config.block, tensor_types)

    def ignores(self, tensor: str) -> bool:
        return tensor.endswith((".weight_shape", ".input_zero_point")) or self._floats.ignores(tensor)

    def layout(self, name: str, num_columns: int) -> WeightLayout | None:
        scales = SCALE_NAMES.get(self._types.get(f"{name}.weight_scale", ""), "f32")
        group = kernel_group(self._config.group_size)
        match self._types.get(f"{name}.weight_packed"):
            case "U8":
                return _MXFP4
            case "I32":
                bits = self._config.bits
                minimums = "point" if f"{name}.weight_zero_point" in self._types else "none"
                offset = 1 << (bits - 1) if minimums == "none" else 0
                return WeightLayout(bits, group, "float", scales, minimums, offset=offset)
        if self._types.get(f"{name}.weight") == "I8":
            is_whole = self._config.has_int8_activations and not self._config.group_size
            return W8A8 if is_whole else WeightLayout(8, group, "float", scales, offset=128)
        return self._floats.layout(name, num_columns)

    def input_order(self, source: TensorSource, name: str, num_columns: int) -> Tensor | None:
        tensor = f"{name}.weight_g_idx"
        return sorted_order(source, tensor, num_columns, self._config.group_size) if tensor in self._types else None

    def pack_rows(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        kind = self._types.get(f"{name}.weight_packed")
        if kind == "U8":
            self._pack_mxfp4(source, name, shape, packed, first_row, ops)
        elif kind == "I32":
            self._pack_words(source, name, shape, packed, first_row, ops)
        elif self._types.get(f"{name}.weight") in FP8_TYPES:
            self._floats.pack_rows(source, name, shape, packed, first_row, ops)
        else:
            self._pack_bytes(source, name, shape, packed, first_row, ops)

    def _scales(self, source: TensorSource, name: str, shape: tuple[int, int]) -> Tensor:
        """float32 [N, G]"""
        if not self._config.group_size:
            return row_scales(source, f"{name}.weight_scale", shape[0])
        groups = -(-shape[1] // self._config.group_size)
        return source.tensor(f"{name}.weight_scale", (shape[0], groups), torch.float32)

    def _pack_bytes(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        if f"{name}.weight_zero_point" in self._types:
            raise CheckpointError(f"{name} is asymmetric int8, which is not supported.")
        tensor = f"{name}.weight"
        scales_NG = self._scales(source, name, shape)
        if packed.layout.group_size:
            scales_NG = spread_groups(scales_NG, self._config.group_size, shape[1])
        for begin, end in row_pieces(*shape):
            codes_RK = source.stored(tensor, shape, begin, end).view(torch.uint8) ^ 128  # q + 128
            ops.pack_parts(packed, first_row + begin, codes_RK, scales_NG[begin:end].contiguous())
            source.release(tensor, begin, end)

    def _pack_words(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        rows, columns = shape
        bits, size = self._config.bits, self._config.group_size
        tensor, words = f"{name}.weight_packed", -(-columns * bits // 32)
        order = self.input_order(source, name, columns)
        scales_NG = spread_groups(self._scales(source, name, shape), size, columns)
        points_NG = None
        if packed.layout.minimums == "point":
            groups = -(-columns // (size or columns))
            stored = source.stored(f"{name}.weight_zero_point", (-(-rows * bits // 32), groups))
            points_NG = spread_groups(unpack_words(stored, bits, rows).float(), size, columns)
        for begin, end in row_pieces(rows, columns):
            words_RW = source.stored(tensor, (rows, words), begin, end)
            codes_RK = unpack_words(words_RW.T.contiguous(), bits, columns).T
            codes_RK = codes_RK.contiguous() if order is None else codes_RK[:, order].contiguous()
            points_RG = None if points_NG is None else points_NG[begin:end]
            ops.pack_parts(packed, first_row + begin, codes_RK, scales_NG[begin:end], points_RG)
            source.release(tensor, begin, end)

    def _pack_mxfp4(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        """The table of the kernels holds doubled values, so scales are halved; an exponent 0 would not survive that."""
        rows, columns = shape
        if columns % _MXFP4_GROUP:
            raise CheckpointError(f"{name} has {columns} inputs: MXFP4 needs a multiple of {_MXFP4_GROUP}.")
        tensor = f"{name}.weight_packed"
        exponents = source.stored(f"{name}.weight_scale", (rows, columns // _MXFP4_GROUP)).float()
        scales_NG = torch.exp2(exponents - 128)
        for begin, end in row_pieces(rows, columns):
            bytes_RB = source.stored(tensor, (rows, columns // 2), begin, end)
            codes_RK = torch.stack([bytes_RB & 15, bytes_RB >> 4], 2).flatten(1)
            ops.pack_parts(packed, first_row + begin, codes_RK, scales_NG[begin:end])
            source.release(tensor, begin, end)
