"""The activations, alone or with a rounding to 8 bits, and that rounding alone.

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
from penstock.kernels.triton.rounding import FP8_BLOCKS, INT8_BLOCKS, INT8_ROWS, empty_rounded, to_codes
from penstock.kernels.triton.specialization import TYPE_NAMES, Specialization, specialization

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.kernels.rounded import ActivationForm, RoundedActivations

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
def quantize_kernel(
    x_ptr, codes_ptr, scales_ptr, k, k_padded, num_blocks, largest,
    X_BLOCK: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """codes [tokens, k_padded] and scales [tokens, num_blocks] float32 of x [tokens, k], BLOCKS blocks a program.

    GATED: of silu_and_mul of x [tokens, 2 k]. A block's largest magnitude becomes `largest`; one that is not finite
    gets NaN for a scale. X_BLOCK: inputs of a block; BLOCK: the power of two that holds them. Reads 2 bytes (GATED: 4)
    and writes 1 an input.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inner = tl.arange(0, BLOCK)
    column = block[:, None] * X_BLOCK + inner[None, :]
    is_own = (inner < X_BLOCK)[None, :] & (block < num_blocks)[:, None]
    inside = is_own & (column < k)
    if GATED:
        gate = tl.load(x_ptr + row * 2 * k + column, mask=inside, other=0.0)
        up = tl.load(x_ptr + row * 2 * k + k + column, mask=inside, other=0.0)
        x = _silu_times(gate, up, x_ptr.dtype.element_ty)
    else:
        x = tl.load(x_ptr + row * k + column, mask=inside, other=0.0)
    codes, scales = to_codes(x.to(tl.float32), largest, codes_ptr.dtype.element_ty, 1)
    tl.store(codes_ptr + row * k_padded + column, codes, mask=is_own & (column < k_padded))
    tl.store(scales_ptr + row * num_blocks + block, scales, mask=block < num_blocks)


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


def silu_and_mul_quantize(gate_up_TJ: Tensor, form: ActivationForm) -> RoundedActivations:
    """silu_and_mul, rounded as `quantize` rounds it."""
    assert gate_up_TJ.shape[1] % 2 == 0, gate_up_TJ.shape
    return _quantize(gate_up_TJ, gate_up_TJ.shape[1] // 2, form)


def quantize(x_TK: Tensor, form: ActivationForm) -> RoundedActivations:
    """x in 8 bits, its codes padded to whole steps of the matrix kernels (rounding.py)."""
    return _quantize(x_TK, x_TK.shape[1], form)


def _quantize(x: Tensor, size: int, form: ActivationForm) -> RoundedActivations:
    assert x.is_contiguous(), x.stride()
    tokens = x.shape[0]
    rounded = empty_rounded(tokens, size, form, x.device)
    k_padded, num_blocks = rounded.codes.shape[1], rounded.scales.shape[1]
    x_block = form.block or k_padded
    block = triton.next_power_of_2(x_block)
    blocks = max(min(_BLOCK // block, triton.next_power_of_2(num_blocks)), 1)
    if tokens:
        quantize_kernel[(tokens, triton.cdiv(num_blocks, blocks))](
            x, rounded.codes, rounded.scales, size, k_padded, num_blocks, QUANTIZED_DTYPES[form.dtype],
            X_BLOCK=x_block, BLOCK=block, BLOCKS=blocks, GATED=size != x.shape[1],
            num_warps=max(row_warps(block * blocks), _WARPS),
        )  # fmt: skip
    return rounded


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
    for gated, form, size in (
        (True, FP8_BLOCKS, 14336), (True, INT8_BLOCKS, 14336), (True, INT8_ROWS, 14336),
        (False, FP8_BLOCKS, 4096), (False, INT8_BLOCKS, 4096), (False, INT8_ROWS, 4096), (False, INT8_ROWS, 14336),
    ):  # fmt: skip
        name, x_block = TYPE_NAMES[form.dtype], form.block or size
        types = {"x_ptr": "*bf16", "codes_ptr": f"*{name}", "scales_ptr": "*fp32", "largest": "fp32"}
        block = triton.next_power_of_2(x_block)
        blocks = max(_BLOCK // block, 1)
        yield specialization(
            f"{'silu_and_mul' if gated else 'quantise'} to {name} by {x_block}", quantize_kernel,
            types | dict.fromkeys(("k", "k_padded", "num_blocks"), "i32"),
            {"X_BLOCK": x_block, "BLOCK": block, "BLOCKS": blocks, "GATED": gated},
            (max(row_warps(block * blocks), _WARPS), 1), aligned=("k", "k_padded"),
            min_capability=89 if form is FP8_BLOCKS else 80, in_test=gated and form is FP8_BLOCKS,
        )  # fmt: skip
