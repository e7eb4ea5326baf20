"""The activations, alone or with a rounding of each row to 8 bits.

Limit: memory. silu_and_mul reads 2 I elements a row and writes I; gelu reads and writes I.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from penstock.kernels.kv_layout import QUANTIZED_DTYPES
from penstock.kernels.triton.norm import row_warps
from penstock.kernels.triton.rounding import to_codes
from penstock.kernels.triton.specialization import TYPE_NAMES, Specialization, specialization

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1024
_WARPS = 4


@triton.jit
def _silu_times(gate, up, dtype: tl.constexpr):
    gate = gate.to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype)
    return (silu.to(tl.float32) * up.to(tl.float32)).to(dtype)


@triton.jit
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Bytes: 3 * size elements a row. A program takes BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up_ptr + row * 2 * size + columns, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * size + size + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row * size + columns, _silu_times(gate, up, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_kernel(
    x_ptr, codes_ptr, scales_ptr, largest, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, GATED: tl.constexpr
):
    """Bytes a row: SIZE elements read (GATED: 2 SIZE), SIZE bytes written. A program holds one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SIZE_PADDED)
    inside = columns < SIZE
    if GATED:
        gate = tl.load(x_ptr + row * 2 * SIZE + columns, mask=inside, other=0.0)
        up = tl.load(x_ptr + row * 2 * SIZE + SIZE + columns, mask=inside, other=0.0)
        x = _silu_times(gate, up, x_ptr.dtype.element_ty)
    else:
        x = tl.load(x_ptr + row * SIZE + columns, mask=inside, other=0.0)
    codes, scale = to_codes(x.to(tl.float32), largest, codes_ptr.dtype.element_ty, 0)
    tl.store(codes_ptr + row * SIZE + columns, codes, mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit
def _gelu_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """Bytes: each element read and written once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(out_ptr + at, gelu.to(out_ptr.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up_TJ: Tensor) -> Tensor:
    """See Ops.silu_and_mul."""
    tokens, width = gate_up_TJ.shape
    assert gate_up_TJ.is_contiguous() and width % 2 == 0, (gate_up_TJ.shape, gate_up_TJ.stride())
    out = torch.empty((tokens, width // 2), dtype=gate_up_TJ.dtype, device=gate_up_TJ.device)
    if out.numel():
        grid = (tokens, triton.cdiv(width // 2, _BLOCK))
        _silu_and_mul_kernel[grid](gate_up_TJ, out, width // 2, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def silu_and_mul_quantize(gate_up_TJ: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """silu_and_mul rounded to int8 or float8_e4m3fn: (codes [T, I], scales [T] float32)."""
    assert gate_up_TJ.shape[1] % 2 == 0, gate_up_TJ.shape
    return _quantize(gate_up_TJ, gate_up_TJ.shape[1] // 2, dtype)


def quantize_rows(x_TK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows rounded to int8 or float8_e4m3fn: (codes [T, K], scales [T] float32). Not finite: the scale is NaN."""
    return _quantize(x_TK, x_TK.shape[1], dtype)


def _quantize(x: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert x.is_contiguous(), x.stride()
    tokens = x.shape[0]
    codes = torch.empty((tokens, size), dtype=dtype, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens:
        _quantize_kernel[(tokens,)](
            x, codes, scales, QUANTIZED_DTYPES[dtype], SIZE=size, SIZE_PADDED=triton.next_power_of_2(size),
            GATED=size != x.shape[1], num_warps=row_warps(size),
        )  # fmt: skip
    return codes, scales


def gelu(x_TI: Tensor) -> Tensor:
    """See Ops.gelu."""
    assert x_TI.is_contiguous(), x_TI.stride()
    out = torch.empty_like(x_TI)
    if x_TI.numel():
        _gelu_kernel[(triton.cdiv(x_TI.numel(), _BLOCK),)](x_TI, out, x_TI.numel(), BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def specializations() -> Iterator[Specialization]:
    """The activations of a Llama of 8 billion parameters (14336 wide), and an encoder's."""
    pointers = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "size": "i32"}
    yield specialization(
        "silu_and_mul", _silu_and_mul_kernel, pointers, {"BLOCK": _BLOCK}, (_WARPS, 1), aligned=("size",), in_test=True
    )
    types = {"x_ptr": "*bf16", "out_ptr": "*bf16", "count": "i32"}
    yield specialization("gelu", _gelu_kernel, types, {"BLOCK": _BLOCK}, (_WARPS, 1), aligned=("count",), in_test=True)
    for size, gated in ((14336, True), (4096, False)):
        for dtype in QUANTIZED_DTYPES:
            name = TYPE_NAMES[dtype]
            types = {"x_ptr": "*bf16", "codes_ptr": f"*{name}", "scales_ptr": "*fp32", "largest": "fp32"}
            constants = {"SIZE": size, "SIZE_PADDED": triton.next_power_of_2(size), "GATED": gated}
            yield specialization(
                f"{'silu_and_mul' if gated else 'rows'} {size} to {name}", _quantize_kernel, types, constants,
                (row_warps(size), 1), min_capability=89 if dtype == torch.float8_e4m3fn else 80,
                in_test=gated,
            )  # fmt: skip
