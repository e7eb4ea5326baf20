"""Weights and activations multiplied as they lie in memory: e4m3 x e4m3, int8 x int8, bfloat16 x bfloat16.

"fp8"   128 inputs are summed by the tensor cores, and that sum is scaled by the weight's and the token's scale of the
        block in float32 and added in float32 (DeepSeek-V3's way: Hopper's e4m3 accumulators keep 14 bits). A scale per
        tensor or per output is one that its blocks share.
"int8"  whole numbers are summed exactly; scaled once a row, or where activations have a scale for 256 inputs, each 256.
"bf16"  for the batch-invariant mode, whose rows the vendor library's many algorithms would not keep; so is "f32", which
        no tensor core multiplies.

Limits (H200: 4.3 TB/s; 790 TFLOP/s bf16, about 1,580 in 8 bits). One byte a weight (two in bf16): bound by memory up to
about 180 tokens, by the tensor cores above. The fp8 loop adds two float32 operations an output for each 128 inputs, an
eighth of the tensor cores' time at most. Not measured on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.triton.tiles import store_tile, tile_rows


@triton.jit
def block_scales(
    scales_ptr, x_scales_ptr, step, columns, rows, n_mask, exists, n_total, x_blocks,
    KIND: tl.constexpr, GROUP: tl.constexpr, X_BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Scales of a step: of the outputs [BLOCK_N] and of the tokens [BLOCK_M]."""
    w_scale = 0.0
    if KIND == "fp8":
        place = step * STEP // GROUP * n_total + columns
        w_scale = tl.load(scales_ptr + place, mask=n_mask, other=0.0).to(tl.float32)
    x_place = rows.to(tl.int64) * x_blocks + step * STEP // X_BLOCK
    return w_scale, tl.load(x_scales_ptr + x_place, mask=exists, other=0.0)


@triton.jit
def step_tiles(
    codes_ptr, x_ptr, columns, rows, step, k, n_mask, exists, STEP: tl.constexpr, IS_EVEN: tl.constexpr,
    BY_TENSOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The weight's tile [BLOCK_N, STEP] of a step and the activations' [STEP, BLOCK_M]."""
    if BY_TENSOR:
        # The copy engine addresses, pads and lays out whole tiles; x_ptr and codes_ptr are descriptors.
        w = codes_ptr.load([tl.program_id(1) * BLOCK_N, step * STEP])
        x = x_ptr.load([tl.program_id(0) * BLOCK_M, step * STEP]).T
    else:
        inner = step * STEP + tl.arange(0, STEP)
        w_mask = n_mask[:, None]
        x_mask = exists[None, :]
        if not IS_EVEN:
            w_mask = w_mask & (inner < k)[None, :]
            x_mask = x_mask & (inner < k)[:, None]
        w = tl.load(codes_ptr + columns[:, None].to(tl.int64) * k + inner[None, :], mask=w_mask, other=0.0)
        x = tl.load(x_ptr + rows[None, :].to(tl.int64) * k + inner[:, None], mask=x_mask, other=0.0)
    return w, x


@triton.jit(do_not_specialize=["num_rows"])
def gemm_dense_kernel(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, bias_ptr, out_ptr, partial_ptr, tile_experts_ptr, pairs_ptr,
    num_rows, n_rows, n_total, k, num_steps, steps_a_split, x_blocks,
    KIND: tl.constexpr, GROUP: tl.constexpr, X_BLOCK: tl.constexpr, STEP: tl.constexpr, IS_EVEN: tl.constexpr,
    TOP_K: tl.constexpr, NUM_SPLITS: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BY_TENSOR: tl.constexpr,
):  # fmt: skip
    """out[row] = x[row] @ weight.T (+ bias) for a tile. x [tokens, k], weight [n_total, k]; in 8 bits STEP divides k.

    x_scales [tokens, x_blocks], one for X_BLOCK inputs (0: one a token). Reads the weights once a tile of tokens.
    BY_TENSOR (sm_90 on, not routed): tiles come by Hopper's tensor copies instead of each thread's own.
    """
    rows, out_rows, exists, first = tile_rows(
        tile_experts_ptr, pairs_ptr, num_rows, tl.program_id(0), n_rows, TOP_K, BLOCK_M
    )
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    n_mask = n < n_rows
    columns = first + n
    IS_BLOCKED: tl.constexpr = X_BLOCK > 0
    SUM: tl.constexpr = tl.int32 if KIND == "int8" else tl.float32
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for _ in range(1 if IS_SPLIT else NUM_SPLITS):
        begin = split * steps_a_split
        end = tl.minimum(begin + steps_a_split, num_steps)
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32 if IS_BLOCKED else SUM)
        if IS_BLOCKED:
            w_scale, x_scale = block_scales(
                scales_ptr, x_scales_ptr, begin, columns, rows, n_mask & (begin < end), exists & (begin < end), n_total,
                x_blocks, KIND, GROUP, X_BLOCK, STEP,
            )  # fmt: skip
        for step in range(begin, end):
            w, x = step_tiles(
                codes_ptr, x_ptr, columns, rows, step, k, n_mask, exists, STEP, IS_EVEN, BY_TENSOR, BLOCK_M, BLOCK_N
            )
            if IS_BLOCKED:
                # The scales of the next step are on their way while this one is multiplied.
                has_next = step + 1 < end
                next_w_scale, next_x_scale = block_scales(
                    scales_ptr, x_scales_ptr, step + 1, columns, rows, n_mask & has_next, exists & has_next, n_total,
                    x_blocks, KIND, GROUP, X_BLOCK, STEP,
                )  # fmt: skip
                products = tl.dot(w, x, out_dtype=SUM).to(tl.float32)
                if KIND == "fp8":
                    products *= w_scale[:, None]
                acc += products * x_scale[None, :]
                w_scale = next_w_scale
                x_scale = next_x_scale
            else:
                acc = tl.dot(w, x, acc, input_precision="ieee" if KIND == "f32" else None, out_dtype=SUM)
        part = acc.to(tl.float32)
        if KIND == "int8":
            part *= tl.load(scales_ptr + columns, mask=n_mask, other=0.0)[:, None]
            if X_BLOCK == 0:
                part *= tl.load(x_scales_ptr + rows, mask=exists, other=0.0)[None, :]
        total += part
        split += 1
    store_tile(
        out_ptr, bias_ptr, partial_ptr, total, out_rows, exists, n, num_rows, n_rows, tl.program_id(2), HAS_BIAS,
        IS_SPLIT,
    )  # fmt: skip
