"""The inner loop of attention over a paged cache: rows of scores against one tile of keys after another.

A tile begins at a multiple of its width, counted from the context's first token, so a row meets the same tiles in the
same order whatever else its program computes: tiles that it must not see leave its sums as they are, bit for bit.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

LOG2_E: Final = 1.4426950408889634


@triton.jit
def next_sums(scores, largest, total):
    """One step of softmax: (weights 2^(score - largest), factor for what was summed before, largest, total)."""
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    # A row that has seen nothing yet has no largest score; 0 keeps its weights and its factor 0.
    base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    weights = tl.exp2(scores - base[:, None])
    factor = tl.exp2(largest - base)
    return weights, factor, new_largest, total * factor + tl.sum(weights, 1)


@triton.jit
def product(a, b, accumulator):
    """a @ b + accumulator; float32 without rounding to TF32."""
    return tl.dot(a, b, accumulator, input_precision="ieee" if a.dtype == tl.float32 else None)


@triton.jit
def attend_tiles(
    q, sums, largest, total, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr, table_ptr, kv_head, num_kv_heads,
    positions, begin, end, first_seen, scale, window, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, QUANTIZED: tl.constexpr, MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Folds the tiles from `begin` (a multiple of BLOCK_N) to `end` into (sums [M, D], largest [M], total [M]).

    q [M, D] at `positions` [M]; slots before first_seen are not read. scale: of the scores, times log2(e). MASKED: some
    row must not see some slot; without it every row sees every slot of these tiles. A value that is NaN makes the
    other rows of a tile NaN too, even those that come before it in the same request; it never leaves its request.
    """
    dims = tl.arange(0, DIM_PADDED)
    known = dims < HEAD_DIM
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        if MASKED:
            readable = (columns < end) & (columns >= first_seen)
            blocks = tl.load(table_ptr + columns // SLOTS, mask=readable, other=0)
        else:
            readable = columns >= 0
            blocks = tl.load(table_ptr + columns // SLOTS)
        head_blocks = blocks.to(tl.int64) * num_kv_heads + kv_head
        if QUANTIZED:
            rows = head_blocks * (SLOTS * (HEAD_DIM + 4)) + columns % SLOTS * HEAD_DIM
            scale_at = head_blocks * (SLOTS * (HEAD_DIM + 4) // 4) + SLOTS * HEAD_DIM // 4 + columns % SLOTS
        else:
            rows = (head_blocks * SLOTS + columns % SLOTS) * HEAD_DIM
        at = rows[:, None] + dims[None, :]
        if MASKED or HEAD_DIM != DIM_PADDED:
            mask = readable[:, None] & known[None, :]
            keys = tl.load(key_ptr + at, mask=mask, other=0.0)
            values = tl.load(value_ptr + at, mask=mask, other=0.0)
        else:
            keys = tl.load(key_ptr + at)
            values = tl.load(value_ptr + at)
        if QUANTIZED:
            keys, values = keys.to(q.dtype), values.to(q.dtype)
        scores = product(q, tl.trans(keys), tl.zeros((q.shape[0], BLOCK_N), tl.float32)) * scale
        if QUANTIZED:
            scores *= tl.load(key_scales_ptr + scale_at, mask=readable, other=0.0)[None, :]
        if MASKED:
            seen = readable[None, :] & (columns[None, :] <= positions[:, None])
            if WINDOWED:
                seen = seen & (columns[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, -float("inf"))
        weights, factor, largest, total = next_sums(scores, largest, total)
        if QUANTIZED:
            weights *= tl.load(value_scales_ptr + scale_at, mask=readable, other=0.0)[None, :]
            if MASKED:
                weights = tl.where(seen, weights, 0.0)
        sums = product(weights.to(q.dtype), values, sums * factor[:, None])
    return sums, largest, total
