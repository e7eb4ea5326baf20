"""What the matrix kernels share: which rows a tile multiplies, and how partial sums meet.

A tile is [BLOCK_N outputs, BLOCK_M tokens]: the weight is the left operand, for the tensor cores take at least 64 rows
on the left and 8 columns on the right, and a decode step has few tokens. K is walked in an order that depends on the
weight alone, in `NUM_SPLITS` ranges whose sums are added in order; programs may share the ranges (IS_SPLIT) or one may
walk them all: the bits are the same, so a row's result depends neither on the other rows nor on the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_rows(tile_experts_ptr, pairs_ptr, num_rows, tile, n_rows, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """(rows of x, rows of the output, which of them exist, first row of the weight) of a tile of tokens.

    TOP_K 0: rows are tokens and the weight is one matrix. Else a tile belongs to one expert (negative: to none), its
    rows are pairs of a token and a place among its TOP_K experts, and weights stand below each other, n_rows each.
    """
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if TOP_K == 0:
        row = place
        out_row = place
        first = 0
        exists = place < num_rows
    else:
        expert = tl.load(tile_experts_ptr + tile)
        out_row = tl.load(pairs_ptr + place)
        row = out_row // TOP_K
        first = tl.maximum(expert, 0).to(tl.int64) * n_rows
        exists = (out_row < num_rows) & (expert >= 0)
    return row, out_row, exists, first


@triton.jit
def store_tile(
    out_ptr, bias_ptr, partial_ptr, total, rows, exists, columns, num_rows, n_rows, split,
    HAS_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Write a tile [BLOCK_N, BLOCK_M] to out [rows, n_rows], or its partial sums to [splits, rows, n_rows]."""
    mask = (columns < n_rows)[:, None] & exists[None, :]
    place = rows[None, :].to(tl.int64) * n_rows + columns[:, None]
    if IS_SPLIT:
        tl.store(partial_ptr + split.to(tl.int64) * num_rows * n_rows + place, total, mask=mask)
    else:
        if HAS_BIAS:
            total += tl.load(bias_ptr + columns, mask=columns < n_rows, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_splits_kernel(
    partial_ptr, bias_ptr, out_ptr, size, n_rows, NUM_SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """out = the sum of partial [splits, size] in their order, plus the bias of each of n_rows columns.

    Moves 4 * splits + 2 bytes an output; of a decode step's partial sums most are still in the L2 cache.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.load(partial_ptr + at, mask=mask, other=0.0)
    for split in tl.static_range(1, NUM_SPLITS):
        total += tl.load(partial_ptr + size * split + at, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % n_rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)
