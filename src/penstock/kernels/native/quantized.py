"""Linear layers over quantised weights, their packing, and rows read back."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

import torch

from penstock.kernels.native.dtypes import DTYPE_CODE
from penstock.kernels.quantized import GGUF_LAYOUTS
from penstock.kernels.reference.gguf_blocks import BLOCKS
from penstock.kernels.reference.quantized import values_of

if TYPE_CHECKING:
    from torch import Tensor

    from penstock._native import Kernels
    from penstock.kernels.quantized import QuantizedLinear, WeightLayout

# As csrc/ops/quantized.h numbers them.
_SCALES: Final = {"f16": 0, "bf16": 1, "f32": 2, "super": 3}
_MINIMUMS: Final = {"none": 0, "own": 1, "point": 2}
_PARTS, _GGUF, _FLOATS = 0, 1, 2


@cache
def _table(layout: WeightLayout, dtype: torch.dtype) -> Tensor | None:
    """What codes mean, as the kernels look it up; None if they are the numbers themselves."""
    if layout.activations == "float":
        return values_of(layout, dtype).to(dtype)
    if layout.values == "integer":
        return None
    return (values_of(layout, dtype) + _table_offset(layout)).to(torch.uint8)


def _table_offset(layout: WeightLayout) -> int:
    """Signed bytes are multiplied as unsigned ones, this much larger; small ones have cheaper products with AVX2."""
    return -int(values_of(layout, torch.float32).min())


@cache
def _numbers(layout: WeightLayout, dtype: torch.dtype) -> tuple[int, ...]:
    table = _table(layout, dtype)
    offset = _table_offset(layout) if table is not None and layout.activations == "int8" else layout.offset
    return (
        layout.bits, layout.group_size, int(layout.activations == "float"), _SCALES[layout.scales],
        _MINIMUMS[layout.minimums], offset, int(layout.x_block == 0), layout.step, layout.header_bytes,
        layout.step_bytes, 0 if table is None else table.data_ptr(),
    )  # fmt: skip


def layout_numbers(layout: WeightLayout | None, dtype: torch.dtype) -> tuple[int, ...]:
    """A layout as the kernels take it, for activations of `dtype`; of floats there is nothing to say."""
    return () if layout is None else _numbers(layout, dtype)


def _check_rows(packed: QuantizedLinear, first_row: int, source: Tensor) -> int:
    assert source.is_contiguous(), source.stride()
    rows = source.shape[0]
    assert 0 <= first_row <= packed.n - rows, (first_row, rows, packed.n)
    return rows


def pack_parts(
    kernels: Kernels,
    num_threads: int,
    packed: QuantizedLinear,
    first_row: int,
    parts: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """See Ops.pack_parts. parts: codes, scales, minimums."""
    codes, scales, minimums = parts
    layout = packed.layout
    rows = _check_rows(packed, first_row, codes)
    groups = -(-packed.k // layout.group_size) if layout.group_size else 1
    assert codes.dtype is torch.uint8, codes.dtype
    assert codes.shape[1] == packed.k, (codes.shape, packed.k)
    assert layout.scales != "super", layout
    assert (minimums is None) == (layout.minimums == "none"), layout
    for part in (scales, scales if minimums is None else minimums):
        assert part.dtype is torch.float32, part.dtype
        assert part.shape == (rows, groups), (part.shape, rows, groups)
        assert part.is_contiguous(), part.stride()
    kernels.quantized_pack(
        _numbers(layout, packed.dtype), _PARTS, codes.data_ptr(), scales.data_ptr(),
        0 if minimums is None else minimums.data_ptr(), 0, packed.data.data_ptr(), first_row, rows, packed.n, packed.k,
        num_threads,
    )  # fmt: skip


def pack_gguf(
    kernels: Kernels, num_threads: int, packed: QuantizedLinear, first_row: int, blocks_RN: Tensor, ggml_type: int
) -> None:
    """See Ops.pack_gguf."""
    rows = _check_rows(packed, first_row, blocks_RN)
    inputs, block_bytes, _ = BLOCKS[ggml_type]
    assert packed.layout == GGUF_LAYOUTS[ggml_type], (packed.layout, ggml_type)
    assert blocks_RN.dtype is torch.uint8, blocks_RN.dtype
    assert packed.k % inputs == 0, (packed.k, ggml_type)
    assert blocks_RN.shape[1] == packed.k // inputs * block_bytes, (blocks_RN.shape, packed.k, ggml_type)
    kernels.quantized_pack(
        _numbers(packed.layout, packed.dtype), _GGUF, blocks_RN.data_ptr(), 0, 0, ggml_type, packed.data.data_ptr(),
        first_row, rows, packed.n, packed.k, num_threads,
    )  # fmt: skip


def quantize_into(kernels: Kernels, num_threads: int, packed: QuantizedLinear, first_row: int, source: Tensor) -> None:
    """See Ops.quantize_into."""
    layout = packed.layout
    rows = _check_rows(packed, first_row, source)
    assert layout.values == "integer", layout
    assert layout.minimums == "none", layout
    assert layout.scales != "super", layout
    assert source.shape[1] == packed.k, (source.shape, packed.k)
    kernels.quantized_pack(
        _numbers(layout, packed.dtype), _FLOATS, source.data_ptr(), 0, 0, DTYPE_CODE[source.dtype],
        packed.data.data_ptr(), first_row, rows, packed.n, packed.k, num_threads,
    )  # fmt: skip


def dequantize(kernels: Kernels, num_threads: int, packed: QuantizedLinear, first_row: int, rows: int | None) -> Tensor:
    """See Ops.dequantize."""
    count = packed.n - first_row if rows is None else rows
    assert 0 <= first_row <= packed.n - count, (first_row, count, packed.n)
    out = torch.empty((count, packed.k))
    _read_rows(kernels, num_threads, packed, (0, first_row), out)
    return out


def embedding(kernels: Kernels, num_threads: int, ids_T: Tensor, weight: QuantizedLinear) -> Tensor:
    """See Ops.embedding."""
    assert ids_T.dtype is torch.int64, ids_T.dtype
    assert ids_T.is_contiguous(), ids_T.stride()
    out = torch.empty((ids_T.shape[0], weight.k), dtype=weight.dtype)
    _read_rows(kernels, num_threads, weight, (ids_T.data_ptr(), 0), out)
    return out


def _read_rows(
    kernels: Kernels, num_threads: int, weight: QuantizedLinear, which: tuple[int, int], out: Tensor
) -> None:
    """which: the address of the rows' ids, or 0 and the first of consecutive ones."""
    layout = weight.layout
    numbers = _numbers(layout, weight.dtype)
    if layout.activations == "float":
        numbers = (*numbers[:-1], _float_values(layout, weight.dtype).data_ptr())
    kernels.quantized_rows(
        numbers, weight.data.data_ptr(), *which, out.shape[0], out.data_ptr(), weight.n, weight.k,
        DTYPE_CODE[out.dtype], num_threads,
    )  # fmt: skip


@cache
def _float_values(layout: WeightLayout, dtype: torch.dtype) -> Tensor:
    return values_of(layout, dtype)


def linear(
    kernels: Kernels,
    num_threads: int,
    x_TK: Tensor,
    weight: QuantizedLinear,
    bias_N: Tensor | None,
    out_dtype: torch.dtype | None = None,
    is_gated: bool = False,
) -> Tensor:
    """See Ops.linear and, if is_gated, Ops.gated_linear."""
    dtype = x_TK.dtype
    m, k = x_TK.shape
    assert x_TK.is_contiguous(), x_TK.stride()
    assert dtype is weight.dtype, (dtype, weight.dtype)
    assert k == weight.k, (k, weight.k)
    bias = 0
    if bias_N is not None:
        assert bias_N.dtype is dtype and bias_N.shape == (weight.n,) and bias_N.is_contiguous(), bias_N.shape
        bias = bias_N.data_ptr()
    assert out_dtype in (None, dtype, torch.float32), out_dtype
    assert not is_gated or (weight.n % 2 == 0 and out_dtype is None), (weight.n, out_dtype)
    out_columns = weight.n // 2 if is_gated else weight.n
    out = torch.empty((m, out_columns), dtype=dtype if out_dtype is None else out_dtype)
    kernels.quantized_linear(
        _numbers(weight.layout, dtype), x_TK.data_ptr(), weight.data.data_ptr(), bias, out.data_ptr(), m, weight.n, k,
        DTYPE_CODE[dtype], DTYPE_CODE[out.dtype], num_threads, is_gated,
    )  # fmt: skip
    return out
