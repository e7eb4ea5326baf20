"""Linear layers on the GPU: which kernel multiplies a weight, and its launch.

Float weights go to the vendor library (torch.matmul), which is at the limit there, but for `row_invariant`: then every
product is our own kernel's, in one tile whatever the number of rows, and float operations are not fused, so that two
compilations of it (K walked by one program, or shared by several) round alike. Without it, our kernels sum a row in the
same order in every tile, but nothing makes two tiles' instructions round alike.
Activations are bfloat16; a float32 model's quantised weights are multiplied as float32 copies of themselves, slowly.
Where a layout asks for activations in 8 bits, only "int8" kinds round them (weights.py); others multiply bfloat16.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from penstock.kernels.reference.quantized import values_of
from penstock.kernels.rounded import RoundedActivations
from penstock.kernels.triton import activation, configs
from penstock.kernels.triton.gemm_codes import gemm_codes_kernel, group_sums_kernel, rows_kernel
from penstock.kernels.triton.gemm_dense import gemm_dense_kernel
from penstock.kernels.triton.rounding import FP8_BLOCKS, INT8_BLOCKS, INT8_ROWS
from penstock.kernels.triton.tiles import add_splits_kernel
from penstock.kernels.triton.weights import DENSE_STEP, DeviceLinear, DeviceQuantized, device_step, kept_bits, lanes

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.kernels.packed import PackedLinear
    from penstock.kernels.quantized import QuantizedLinear, WeightLayout
    from penstock.kernels.rounded import ActivationForm, Activations

_TABLES: Final = ("iq4_nl", "nf4")
_MIN_TENSOR_TOKENS: Final = 64
_ADD_BLOCK: Final = 1024
# Of row_invariant: the tile for so many tokens serves all. float32 has no tensor cores that keep its bits.
_INVARIANT_TOKENS: Final = 64
FLOAT32_TILE: Final = configs.Tile(1 << 30, 64, 64, 8, 2)
_DENSE_STEPS: Final = {"bf16": 64, "f32": 32}  # of float weights


class Routing(NamedTuple):
    """Which tokens meet which expert (moe.py). rows: pairs of a token and one of its experts.

    tile_experts int32 [tiles], negative where a tile is empty; pairs int32 [tiles * block_m], num_pairs where none.
    """

    tile_experts: Tensor
    pairs: Tensor
    num_pairs: int
    num_experts: int
    top_k: int
    block_m: int


class _Launch(NamedTuple):
    """A tile's compilation, and the cut of K."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    num_splits: int
    steps_a_split: int
    is_split: bool
    by_tensor: bool
    is_invariant: bool

    @property
    def constants(self) -> dict[str, object]:
        """Of either matrix kernel."""
        return {
            "NUM_SPLITS": self.num_splits, "IS_SPLIT": self.is_split, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n,
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": not self.is_invariant,
        }  # fmt: skip


class _Multiplication(NamedTuple):
    """x [tokens, k] times a weight [n_total, k] of experts of n_rows each -> out [num_rows, n_rows].

    is_invariant: see row_invariant.
    """

    num_rows: int
    n_rows: int
    out: Tensor
    bias: Tensor | None
    routing: Routing | None
    is_invariant: bool = False


def linear(
    x_TK: Tensor,
    weight: PackedLinear | QuantizedLinear,
    bias_N: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    row_invariant: bool = False,
) -> Tensor:
    """See Ops.linear."""
    if not row_invariant and (x_TK.dtype is torch.float32 or isinstance(weight, DeviceLinear)):
        return _by_vendor(x_TK, weight, bias_N, out_dtype)
    if x_TK.dtype is torch.float32 and isinstance(weight, DeviceQuantized):
        weight = DeviceLinear(dequantize(weight), weight.n, weight.k, torch.float32)
    assert x_TK.shape[1] == weight.k, (x_TK.shape, weight.k)
    num_rows, dtype = x_TK.shape[0], x_TK.dtype if out_dtype is None else out_dtype
    out = torch.empty((num_rows, weight.n), dtype=dtype, device=x_TK.device)
    _multiply(x_TK, weight, _Multiplication(num_rows, weight.n, out, bias_N, None, row_invariant))
    return out


def rounded_linear(
    x: RoundedActivations,
    weight: PackedLinear | QuantizedLinear,
    bias_N: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    row_invariant: bool = False,
) -> Tensor:
    """See RoundedOps.linear."""
    num_rows = x.codes.shape[0]
    out = torch.empty((num_rows, weight.n), dtype=out_dtype or weight.dtype, device=x.codes.device)
    _multiply(x, weight, _Multiplication(num_rows, weight.n, out, bias_N, None, row_invariant))
    return out


def routed_linear(
    x: Activations, weight: PackedLinear | QuantizedLinear, routing: Routing, *, row_invariant: bool = False
) -> Tensor:
    """x of each pair's token times its expert's matrix -> [pairs, n / experts] of x's dtype.

    weight: the experts' matrices below each other. A pair's token is its number // top_k.
    """
    dtype = weight.dtype if isinstance(x, RoundedActivations) else x.dtype
    if dtype is torch.float32 and isinstance(weight, DeviceQuantized):
        weight = DeviceLinear(dequantize(weight), weight.n, weight.k, torch.float32)
    n_rows = weight.n // routing.num_experts
    out = torch.empty((routing.num_pairs, n_rows), dtype=dtype, device=weight.data.device)
    _multiply(x, weight, _Multiplication(routing.num_pairs, n_rows, out, None, routing, row_invariant))
    return out


def embedding(ids_T: Tensor, weight: PackedLinear | QuantizedLinear) -> Tensor:
    """See Ops.embedding."""
    if isinstance(weight, DeviceLinear):
        return weight.data[ids_T]
    assert isinstance(weight, DeviceQuantized), type(weight)
    return _rows(ids_T, weight, weight.dtype)


def dequantize(packed: QuantizedLinear, first_row: int = 0, rows: int | None = None) -> Tensor:
    """See Ops.dequantize."""
    assert isinstance(packed, DeviceQuantized), type(packed)
    end = packed.n if rows is None else first_row + rows
    return _rows(torch.arange(first_row, end, device=packed.data.device), packed, torch.float32)


def form_of(weight: PackedLinear | QuantizedLinear) -> ActivationForm | None:
    """What a weight's bfloat16 inputs are rounded to before they are multiplied; None: they are not."""
    if not isinstance(weight, DeviceQuantized) or weight.kind == "codes" or weight.dtype is not torch.bfloat16:
        return None
    if weight.kind == "fp8":
        return FP8_BLOCKS
    return INT8_BLOCKS if weight.layout.x_block else INT8_ROWS


def family_of(weight: PackedLinear | QuantizedLinear) -> str:
    """What the kernel of a weight is called in configs.py."""
    if isinstance(weight, DeviceLinear):
        return "f32" if weight.dtype is torch.float32 else "bf16"
    assert isinstance(weight, DeviceQuantized), type(weight)
    if weight.kind != "codes":
        return weight.kind
    return f"codes{kept_bits(weight.layout)}" + ("" if weight.layout.group_size >= DENSE_STEP else "_fine")


def _by_vendor(
    x_TK: Tensor, weight: PackedLinear | QuantizedLinear, bias_N: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    matrix = dequantize(weight) if isinstance(weight, DeviceQuantized) else weight.data
    if out_dtype in (None, x_TK.dtype):
        return torch.nn.functional.linear(x_TK, matrix, bias_N)
    assert out_dtype is torch.float32, out_dtype
    if x_TK.is_cuda:
        out = torch.mm(x_TK, matrix.T, out_dtype=torch.float32)
    else:
        out = x_TK.float() @ matrix.float().T
    return out if bias_N is None else out.add_(bias_N)


def _multiply(x: Activations, weight: PackedLinear | QuantizedLinear, job: _Multiplication) -> None:
    if job.num_rows == 0:
        return
    if isinstance(weight, DeviceLinear):
        step = _DENSE_STEPS[family_of(weight)]
    else:
        assert isinstance(weight, DeviceQuantized), type(weight)
        step = device_step(weight.layout) if weight.kind == "codes" else DENSE_STEP
    launch = _launch(job.out.device, family_of(weight), job, weight.k, step)
    partial = job.out
    if launch.is_split:
        shape = (launch.num_splits, job.num_rows, job.n_rows)
        partial = torch.empty(shape, dtype=torch.float32, device=job.out.device)
    tiles = triton.cdiv(job.num_rows, launch.block_m) if job.routing is None else job.routing.tile_experts.shape[0]
    grid = (tiles, triton.cdiv(job.n_rows, launch.block_n), launch.num_splits if launch.is_split else 1)
    if isinstance(weight, DeviceQuantized) and weight.kind == "codes":
        assert isinstance(x, torch.Tensor), type(x)
        _multiply_codes(x, weight, job, launch, grid, partial)
    else:
        _multiply_dense(x, weight, job, launch, grid, partial)
    if launch.is_split:
        size = job.num_rows * job.n_rows
        bias = job.out if job.bias is None else job.bias
        add_splits_kernel[(triton.cdiv(size, _ADD_BLOCK),)](
            partial, bias, job.out, size, job.n_rows, NUM_SPLITS=launch.num_splits, HAS_BIAS=job.bias is not None,
            BLOCK=_ADD_BLOCK,
        )  # fmt: skip


def _launch(device: torch.device, family: str, job: _Multiplication, k: int, step: int) -> _Launch:
    """Programs share the ranges of K while one tile of tokens would not fill the card; later each walks them all."""
    card = configs.of_device(device)
    if job.is_invariant:
        tile = tile_for(card, family, 0, row_invariant=True)
        block_m = tile.block_m if job.routing is None else job.routing.block_m
        splits = card.split(family, job.n_rows, k, step) if job.routing is None else 1
        programs = triton.cdiv(job.num_rows, block_m) * triton.cdiv(job.n_rows, tile.block_n)
        is_split = splits > 1 and programs < 2 * card.multiprocessors
    elif job.routing is None:
        tile = card.tile(family, job.num_rows)
        splits = card.split(family, job.n_rows, k, step)
        block_m = tile.block_m
        programs = triton.cdiv(job.num_rows, block_m) * triton.cdiv(job.n_rows, tile.block_n)
        is_split = splits > 1 and programs < 2 * card.multiprocessors
        if splits > 1 and not is_split:
            tile = card.walked_tile(family, job.num_rows)
            block_m = tile.block_m
    else:
        tile = tile_for(card, family, job.routing.block_m, row_invariant=False)
        splits, is_split, block_m = 1, False, job.routing.block_m
    steps_a_split = triton.cdiv(triton.cdiv(k, step), splits)
    # A descriptor costs the host some microseconds: too much for few tokens.
    by_tensor = card.tensor_copies and card.capability >= 90 and job.routing is None and block_m >= _MIN_TENSOR_TOKENS
    return _Launch(
        block_m, tile.block_n, tile.num_warps, configs.stages(tile.num_stages), splits, steps_a_split, is_split,
        by_tensor, job.is_invariant,
    )  # fmt: skip


def tile_for(card: configs.Card, family: str, num_tokens: int, *, row_invariant: bool) -> configs.Tile:
    """The tile that multiplies so many tokens; with row_invariant, any number."""
    if family == "f32":
        return FLOAT32_TILE
    return card.tile(family, _INVARIANT_TOKENS if row_invariant else num_tokens)


def _multiply_codes(
    x_TK: Tensor,
    weight: DeviceQuantized,
    job: _Multiplication,
    launch: _Launch,
    grid: tuple[int, ...],
    partial: Tensor,
) -> None:
    layout, tokens = weight.layout, x_TK.shape[0]
    sums = weight.scales
    if layout.minimums != "none":
        sums = _group_sums(x_TK, min(layout.group_size, device_step(layout)), device_step(layout))
    routing = (job.out, job.out) if job.routing is None else (job.routing.tile_experts, job.routing.pairs)
    step = device_step(layout)
    gemm_codes_kernel[grid](
        x_TK, sums, *_pointers(weight), job.out if job.bias is None else job.bias, job.out, partial, *routing,
        job.num_rows, tokens, job.n_rows, weight.n, weight.k, triton.cdiv(weight.k, step), launch.steps_a_split,
        _num_supers(weight), **code_constants(weight.layout), IS_EVEN=weight.k % step == 0,
        TOP_K=0 if job.routing is None else job.routing.top_k, HAS_BIAS=job.bias is not None and not launch.is_split,
        **launch.constants,
    )  # fmt: skip


def _multiply_dense(
    x: Activations,
    weight: PackedLinear | QuantizedLinear,
    job: _Multiplication,
    launch: _Launch,
    grid: tuple[int, ...],
    partial: Tensor,
) -> None:
    if isinstance(weight, DeviceQuantized):
        kind, scales, group, step = weight.kind, weight.scales, weight.layout.group_size, DENSE_STEP
        form = form_of(weight)
        assert form is not None, weight.kind
        x_TK, x_scales = x if isinstance(x, RoundedActivations) else activation.quantize(x, form)
        assert x_TK.dtype is form.dtype and x_TK.shape[1] == weight.codes.shape[1], (x_TK.dtype, x_TK.shape)
        codes, x_block, x_blocks = weight.codes.view(form.dtype), form.block, x_scales.shape[1]
    else:
        assert isinstance(x, torch.Tensor), type(x)
        x_TK, kind = x, family_of(weight)
        codes, scales, x_scales, group, x_block = weight.data, job.out, job.out, 0, 0
        x_blocks, step = 0, _DENSE_STEPS[kind]
    k = x_TK.shape[1]
    by_tensor = launch.by_tensor and k * x_TK.element_size() % 16 == 0
    if by_tensor:
        x_TK = TensorDescriptor.from_tensor(x_TK, [launch.block_m, step])
        codes = TensorDescriptor.from_tensor(codes, [launch.block_n, step])
    routing = (job.out, job.out) if job.routing is None else (job.routing.tile_experts, job.routing.pairs)
    gemm_dense_kernel[grid](
        x_TK, x_scales, codes, scales, job.out if job.bias is None else job.bias, job.out, partial, *routing,
        job.num_rows, job.n_rows, weight.n, k, triton.cdiv(k, step), launch.steps_a_split, x_blocks, KIND=kind,
        GROUP=group, X_BLOCK=x_block, STEP=step, IS_EVEN=k % step == 0,
        TOP_K=0 if job.routing is None else job.routing.top_k, HAS_BIAS=job.bias is not None and not launch.is_split,
        BY_TENSOR=by_tensor, **launch.constants,
    )  # fmt: skip


def _group_sums(x_TK: Tensor, group: int, step: int) -> Tensor:
    """float32 [groups of whole steps, T]: of each token's inputs, `group` at a time."""
    tokens, k = x_TK.shape
    groups, each = triton.cdiv(k, step) * step // group, 256 // group
    sums = torch.empty((groups, tokens), dtype=torch.float32, device=x_TK.device)
    group_sums_kernel[(triton.cdiv(tokens, 16), triton.cdiv(groups, each))](
        x_TK, sums, tokens, k, groups, GROUP=group, BLOCK_M=16, GROUPS=each, num_warps=4
    )
    return sums


def _rows(ids: Tensor, weight: DeviceQuantized, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [T] of a weight -> [T, k] of `dtype`."""
    layout, k = weight.layout, weight.k
    if weight.kind == "codes":
        out = torch.empty((ids.shape[0], k), dtype=dtype, device=ids.device)
        if ids.shape[0]:
            rows_kernel[(ids.shape[0], triton.cdiv(k, device_step(layout)))](
                ids, *_pointers(weight), out, weight.n, k, _num_supers(weight), **code_constants(layout), num_warps=1
            )
        return out
    if weight.kind == "int8":
        return (weight.codes[ids, :k].float() * weight.scales[ids, None]).to(dtype)
    scales = weight.scales[:, ids].float().T.repeat_interleave(layout.group_size, 1)[:, :k]
    return (weight.codes[ids, :k].view(torch.float8_e4m3fn).float() * scales).to(dtype)


def _pointers(weight: DeviceQuantized) -> tuple[Tensor, ...]:
    """codes, high, scales, minimums, supers, table; the codes stand in for what a layout has not."""
    codes = weight.codes
    optional = [
        codes if part is None else part for part in (weight.high, weight.scales, weight.minimums, weight.supers)
    ]
    return (codes, *optional, _table(weight.layout, codes.device) if weight.layout.values in _TABLES else codes)


@cache
def _table(layout: WeightLayout, device: torch.device) -> Tensor:
    return values_of(layout, torch.bfloat16).to(device, torch.bfloat16)


def _num_supers(weight: DeviceQuantized) -> int:
    """Super scales of an output."""
    return 0 if weight.supers is None else weight.supers.shape[1]


@cache
def code_constants(layout: WeightLayout) -> dict[str, object]:
    """Constants of the kernels of kind "codes"."""
    return {
        "BITS": kept_bits(layout), "FIELDS": device_step(layout) // lanes(layout), "LANES": lanes(layout),
        "GROUP": layout.group_size, "OFFSET": layout.offset,
        "VALUES": "table" if layout.values in _TABLES else layout.values, "MINIMUMS": layout.minimums,
        "HAS_SUPERS": layout.scales == "super",
    }  # fmt: skip
