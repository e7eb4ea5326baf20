"""RMSNorm and LayerNorm, alone, after a sum, or rounded to 8 bits for the next linear. One program a row, read once.

Limit: memory. rms_norm moves 2 rows (read, write), with a residual 4, rounded to 8 bits half a row less.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from penstock.kernels.kv_layout import QUANTIZED_DTYPES
from penstock.kernels.triton.rounding import FP8_BLOCKS, INT8_BLOCKS, INT8_ROWS, empty_rounded, to_codes
from penstock.kernels.triton.specialization import TYPE_NAMES, Specialization, specialization
from penstock.kernels.triton.weights import DENSE_STEP

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.kernels.rounded import ActivationForm, RoundedActivations

# Elements that one warp holds of a row: 16 a lane, two loads of 16 bytes in bfloat16.
_WARP_ELEMENTS = 512
_MAX_WARPS = 16


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, scales_ptr, eps, largest, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, OUT_SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Bytes: SIZE elements of x read and of out written a row; the residual read and written; weights stay in L2.

    BLOCKS > 0: out [tokens, OUT_SIZE] are codes, with a scale for each of BLOCKS blocks of BLOCK columns of a row.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SIZE_PADDED)
    inside = columns < SIZE
    at = row * SIZE + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + residual).to(x_ptr.dtype.element_ty)
        tl.store(residual_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    normed = (x * inverse * weight).to(x_ptr.dtype.element_ty)
    if BLOCKS > 0:
        # A view of the row: its threads keep what they hold, and a block stays within a warp up to 256 columns.
        blocked = tl.reshape(tl.where(inside, normed.to(tl.float32), 0.0), (SIZE_PADDED // BLOCK, BLOCK))
        codes, scales = to_codes(blocked, largest, out_ptr.dtype.element_ty, 1)
        # Runs of 8: for the codes' sake threads would hold 16 columns, and sum them in another order than without.
        out_columns = tl.max_contiguous(columns, 8)
        tl.store(out_ptr + row * OUT_SIZE + out_columns, tl.reshape(codes, (SIZE_PADDED,)), mask=columns < OUT_SIZE)
        block = tl.arange(0, SIZE_PADDED // BLOCK)
        tl.store(scales_ptr + row * BLOCKS + block, scales, mask=block < BLOCKS)
    else:
        tl.store(out_ptr + at, normed, mask=inside)


@triton.jit
def _layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, eps, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Bytes: SIZE elements of x (and of the residual) read and of out written a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, SIZE_PADDED)
    inside = columns < SIZE
    at = row * SIZE + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = (x + residual).to(x_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 0) / SIZE, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 0) / SIZE + eps)
    tl.store(out_ptr + at, (centred * inverse * weight + bias).to(out_ptr.dtype.element_ty), mask=inside)


def row_warps(size: int) -> int:
    """Warps of a program that holds a whole row of `size` elements."""
    warps: int = triton.next_power_of_2(size) // _WARP_ELEMENTS
    return min(max(warps, 1), _MAX_WARPS)


def rms_norm(x_TK: Tensor, residual_TK: Tensor | None, weight_K: Tensor, eps: float) -> Tensor:
    """See Ops.rms_norm."""
    out = torch.empty_like(x_TK)
    _launch_rms_norm(x_TK, residual_TK, weight_K, eps, out)
    return out


def rms_norm_quantize(
    x_TK: Tensor, residual_TK: Tensor | None, weight_K: Tensor, eps: float, form: ActivationForm
) -> RoundedActivations:
    """rms_norm, rounded as activation.quantize rounds it."""
    rounded = empty_rounded(x_TK.shape[0], x_TK.shape[1], form, x_TK.device)
    _launch_rms_norm(x_TK, residual_TK, weight_K, eps, rounded.codes, (form.block, rounded.scales))
    return rounded


def _launch_rms_norm(
    x_TK: Tensor,
    residual_TK: Tensor | None,
    weight_K: Tensor,
    eps: float,
    out: Tensor,
    rounding: tuple[int, Tensor | None] = (0, None),
) -> None:
    """rounding: the block and the scales where `out` are codes."""
    tokens, size = x_TK.shape
    _check_rows(x_TK, residual_TK, weight_K)
    if tokens == 0:
        return
    x_block, scales = rounding
    size_padded = max(triton.next_power_of_2(size), DENSE_STEP)
    _rms_norm_kernel[(tokens,)](
        x_TK, residual_TK, weight_K, out, scales, eps, QUANTIZED_DTYPES.get(out.dtype, 0.0), SIZE=size,
        SIZE_PADDED=size_padded, HAS_RESIDUAL=residual_TK is not None, OUT_SIZE=out.shape[1],
        BLOCK=min(x_block or size_padded, size_padded), BLOCKS=0 if scales is None else scales.shape[1],
        num_warps=row_warps(size),
    )  # fmt: skip


def layer_norm(x_TK: Tensor, residual_TK: Tensor | None, weight_K: Tensor, bias_K: Tensor, eps: float) -> Tensor:
    """See Ops.layer_norm."""
    tokens, size = x_TK.shape
    _check_rows(x_TK, residual_TK, weight_K)
    assert bias_K.shape == (size,) and bias_K.dtype is x_TK.dtype, (bias_K.shape, bias_K.dtype)
    out = torch.empty_like(x_TK)
    if tokens:
        _layer_norm_kernel[(tokens,)](
            x_TK, residual_TK, weight_K, bias_K, out, eps, SIZE=size, SIZE_PADDED=triton.next_power_of_2(size),
            HAS_RESIDUAL=residual_TK is not None, num_warps=row_warps(size),
        )  # fmt: skip
    return out


def _check_rows(x_TK: Tensor, residual_TK: Tensor | None, weight_K: Tensor) -> None:
    assert x_TK.is_contiguous() and weight_K.dtype is x_TK.dtype, (x_TK.stride(), weight_K.dtype)
    assert weight_K.shape == x_TK.shape[1:], (x_TK.shape, weight_K.shape)
    if residual_TK is not None:
        assert residual_TK.shape == x_TK.shape and residual_TK.dtype is x_TK.dtype and residual_TK.is_contiguous()


def specializations() -> Iterator[Specialization]:
    """The norms of models with 4096 and 8192 inputs, and the 768 of an encoder."""
    for size in (4096, 8192):
        for form in (None, FP8_BLOCKS, INT8_BLOCKS, INT8_ROWS):
            out = TYPE_NAMES[torch.bfloat16 if form is None else form.dtype]
            block = size if form is None else form.block or size
            constants = {"SIZE": size, "SIZE_PADDED": size, "HAS_RESIDUAL": True, "OUT_SIZE": size, "BLOCK": block}
            constants["BLOCKS"] = 0 if form is None else size // block
            types = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr"), "*bf16")
            types |= {"out_ptr": f"*{out}", "scales_ptr": "*fp32", "eps": "fp32", "largest": "fp32"}
            yield specialization(
                f"rms_norm {size} to {out}" + ("" if form is None else f" by {block}"), _rms_norm_kernel, types,
                constants, (row_warps(size), 1), min_capability=89 if form is FP8_BLOCKS else 80,
                in_test=size == 4096 and form in (None, FP8_BLOCKS),
            )  # fmt: skip
    types = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16") | {"eps": "fp32"}
    constants = {"SIZE": 768, "SIZE_PADDED": 1024, "HAS_RESIDUAL": True}
    yield specialization("layer_norm 768", _layer_norm_kernel, types, constants, (row_warps(768), 1), in_test=True)
