"""bitsandbytes: NF4 (4-bit codes of a table, a scale for each block of 64) and LLM.int8 (a scale for each output).

    NF4   weight U8 [N * K / 2, 1], the upper nibble first; weight.absmax F32 [blocks], or U8 with a second level:
          weight.nested_absmax F32, weight.nested_quant_map F32 [256]; weight.quant_map F32 [16];
          weight.quant_state.bitsandbytes__nf4: JSON as bytes (blocksize, nested_blocksize, nested_offset, shape)
    int8  weight I8 [N, K]; SCB F32 [N]; weight = q * SCB / 127

LLM.int8's split of activations into outliers and the rest is a way to multiply, not to store: activations stay as they
are here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from penstock.base.errors import CheckpointError
from penstock.kernels.ops import Ops
from penstock.kernels.quantized import NF4, QuantizedLinear, WeightLayout
from penstock.quantization.integer_codes import spread_groups
from penstock.quantization.stored_format import StoredFormat, row_pieces
from penstock.quantization.tensor_source import TensorSource

_INT8 = WeightLayout(8, 256, "float", "f32", offset=128)
_STATE = "weight.quant_state.bitsandbytes__nf4"
_BLOCK = 64
_MAX_STATE_BYTES = 1 << 16


class BitsAndBytesFormat(StoredFormat):
    """Built from the header of the checkpoint: the types of its tensors say which linears are quantised."""

    def ignores(self, tensor: str) -> bool:
        return tensor.endswith((".weight_format", ".weight.quant_map"))

    def layout(self, name: str, num_columns: int) -> WeightLayout | None:  # noqa: ARG002  the signature is the base's
        match self._types.get(f"{name}.weight"):
            case "U8":
                return NF4
            case "I8":
                return _INT8
        return None

    def pack_rows(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        if packed.layout == NF4:
            self._pack_nf4(source, name, shape, packed, first_row, ops)
        else:
            self._pack_int8(source, name, shape, packed, first_row, ops)

    def _pack_int8(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        scales_N1 = source.tensor(f"{name}.SCB", (shape[0],), torch.float32)[:, None] / 127
        for begin, end in row_pieces(*shape):
            codes_RK = source.stored(f"{name}.weight", shape, begin, end).view(torch.uint8) ^ 128  # q + 128
            ops.pack_parts(packed, first_row + begin, codes_RK, spread_groups(scales_N1[begin:end], 0, shape[1]))
            source.release(f"{name}.weight", begin, end)

    def _pack_nf4(
        self, source: TensorSource, name: str, shape: tuple[int, int], packed: QuantizedLinear, first_row: int, ops: Ops
    ) -> None:
        rows, columns = shape
        state = _read_state(source, name)
        if state.get("blocksize") != _BLOCK or columns % _BLOCK:
            raise CheckpointError(
                f"{name} has {columns} inputs in blocks of {state.get('blocksize')}, not of {_BLOCK}."
            )
        scales_NG = self._absmax(source, name, rows * columns // _BLOCK, state).view(rows, columns // _BLOCK)
        tensor, row_bytes = f"{name}.weight", columns // 2
        for begin, end in row_pieces(rows, columns):
            span = (begin * row_bytes, end * row_bytes)
            bytes_RB = source.stored(tensor, (rows * row_bytes, 1), *span).view(end - begin, row_bytes)
            codes_RK = torch.stack([bytes_RB >> 4, bytes_RB & 15], 2).flatten(1)
            ops.pack_parts(packed, first_row + begin, codes_RK, scales_NG[begin:end].contiguous())
            source.release(tensor, *span)

    def _absmax(self, source: TensorSource, name: str, count: int, state: Mapping[str, Any]) -> Tensor:
        """The scales of all blocks, float32."""
        tensor = f"{name}.weight.absmax"
        if self._types.get(tensor) != "U8":
            return source.tensor(tensor, (count,), torch.float32)
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if not isinstance(size, int) or size < 1 or not isinstance(offset, int | float):
            raise CheckpointError(f"{name}: the quant_state has no nested_blocksize or nested_offset.")
        table = source.tensor(f"{name}.weight.nested_quant_map", (256,), torch.float32)
        outer = source.tensor(f"{name}.weight.nested_absmax", (-(-count // size),), torch.float32)
        codes = source.stored(tensor, (count,)).long()
        return table[codes] * outer.repeat_interleave(size)[:count] + offset


def _read_state(source: TensorSource, name: str) -> dict[str, Any]:
    shape = source.shape(f"{name}.{_STATE}")
    if shape is None or len(shape) != 1 or shape[0] > _MAX_STATE_BYTES:
        raise CheckpointError(f"{name} is 4-bit without the quant_state of NF4; only NF4 is supported, not FP4.")
    try:
        state = json.loads(bytes(source.stored(f"{name}.{_STATE}", shape).tolist()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}.{_STATE} is not JSON.") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{name}.{_STATE} is not a JSON object.")
    return state
