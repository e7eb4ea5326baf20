"""Codes of 2 to 8 bits times bfloat16 activations: W4A16, W8A16, MXFP4, NF4 and every GGUF type (weights.py).

A group's codes become bfloat16 exactly (small integers, or a table's values), its products are summed by the tensor
cores in float32, and the sum is scaled in float32: no weight is rounded. A minimum (or zero point) counts as minimum *
(the sum of the group's inputs), which group_sums_kernel sums once for all outputs.

Limits (H200: 4.3 TB/s, 790 TFLOP/s bf16). One token reads bits / 8 bytes a weight, so W4 with groups of 128 moves
0.52 bytes a weight and is bound by memory up to about 50 tokens. Beside it stands the issue of instructions: the loop
compiled for sm_90 takes 3.1 for a weight and thread (128 x 16 tiles), and 4.3 TB/s of 4-bit codes leave room for 3.4,
so about two thirds of the bandwidth are the expectation. Not measured on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.triton.tiles import store_tile, tile_rows


@triton.jit
def byte_values(words, FIELD: tl.constexpr, OFFSET: tl.constexpr, VALUES: tl.constexpr):
    """bfloat16 of one byte of each word."""
    code = (words >> (8 * FIELD)) & 255
    if VALUES == "e4m3":
        # The bits at bfloat16's places are the value times 2^-120.
        bits = ((code & 127) << 4) | ((code & 128) << 8)
        value = bits.to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32) * 2.0**120
    elif VALUES == "e5m2":
        # The upper byte of a float16.
        value = (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # 0x4B000000 | code is 2^23 + code in float32.
        value = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)
    return value.to(tl.bfloat16)


@triton.jit
def small_values(
    words, high, table_ptr, FIELD: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, VALUES: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """bfloat16 [ROWS, LANES] of a field of 2, 4 or 6 bits.

    A code below 128 becomes bfloat16 by its bits: 0x4300 | code is 128 + code. Two lanes share a word, so one mask and
    one "or" make two of them.
    """
    if BITS == 2:
        pairs = (words >> (2 * FIELD)) & 0x00030003
    else:
        pairs = (words >> (4 * (FIELD % 4))) & 0x000F000F
    if BITS == 6:
        pairs = pairs | (((high >> (2 * FIELD)) & 0x00030003) << 4)
    if VALUES == "mxfp4":
        # The bits at bfloat16's places are the (doubled) value times 2^-127.
        pairs = ((pairs & 0x00070007) << 6) | ((pairs & 0x00080008) << 12)
    elif VALUES == "integer":
        pairs = pairs | 0x43004300
    lanes = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).reshape(ROWS, LANES)
    if VALUES == "mxfp4":
        values = lanes.to(tl.bfloat16, bitcast=True) * 2.0**127
    elif VALUES == "integer":
        values = lanes.to(tl.bfloat16, bitcast=True) - (128.0 + OFFSET)
    else:
        values = tl.load(table_ptr + lanes)
    return values


@triton.jit
def field_values(
    words, high, table_ptr, FIELD: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, VALUES: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """bfloat16 [ROWS, LANES]: what the codes of one field mean."""
    if BITS == 8:
        values = byte_values(words, FIELD, OFFSET, VALUES)
    else:
        values = small_values(words, high, table_ptr, FIELD, BITS, OFFSET, VALUES, ROWS, LANES)
    return values


@triton.jit
def group_scales(
    parts_ptr, supers_ptr, group, columns, mask, n_total, GROUP: tl.constexpr, COUNT: tl.constexpr,
    HAS_SUPERS: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N] of each of COUNT groups from `group` on: scales, or minimums."""
    scales = ()
    for index in tl.static_range(COUNT):
        scale = tl.load(parts_ptr + (group + index) * n_total + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_SUPERS:
            place = (group + index) * GROUP // 256 * n_total + columns
            scale *= tl.load(supers_ptr + place, mask=mask, other=0.0).to(tl.float32)
        scales += (scale,)  # type: ignore[assignment]
    return scales


@triton.jit
def step_words(codes_ptr, high_ptr, places, stride, step, mask, BITS: tl.constexpr):
    """Words of a step, of its later fields, and of the codes' upper bits; the first stand in for what is not kept."""
    begin = tl.cast(step, tl.int64) * stride
    if BITS == 6:
        words = tl.load(codes_ptr + places + 2 * begin, mask=mask, other=0)
        later = tl.load(codes_ptr + places + 2 * begin + stride, mask=mask, other=0)
        high = tl.load(high_ptr + places + begin, mask=mask, other=0)
    else:
        words = tl.load(codes_ptr + places + begin, mask=mask, other=0)
        later = words
        high = words
    return words, later, high


@triton.jit
def group_products(
    words, later, high, table_ptr, x_ptrs, exists, inputs_left, lane, INDEX: tl.constexpr, SHARED: tl.constexpr,
    BITS: tl.constexpr, OFFSET: tl.constexpr, VALUES: tl.constexpr, IS_EVEN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N, BLOCK_M]: products of the SHARED fields of group INDEX of a step; x_ptrs: at its inputs."""
    products = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for shared in tl.static_range(SHARED):
        field = INDEX * SHARED + shared
        part = later if BITS == 6 and field >= 4 else words
        w = field_values(part, high, table_ptr, field, BITS, OFFSET, VALUES, BLOCK_N, LANES)
        x_mask = exists[None, :]
        if not IS_EVEN:
            x_mask = x_mask & (field * LANES + lane < inputs_left)[:, None]
        products = tl.dot(w, tl.load(x_ptrs + field * LANES, mask=x_mask, other=0.0), products)
    return products


@triton.jit
def group_minimum(
    minimums_ptr, supers_ptr, group, columns, mask, n_total, num_supers, scale, GROUP: tl.constexpr,
    MINIMUMS: tl.constexpr, HAS_SUPERS: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_N]: what each unit of a group's inputs adds, beside its code."""
    minimum = tl.load(minimums_ptr + group * n_total + columns, mask=mask, other=0.0).to(tl.float32)
    if MINIMUMS == "point":
        minimum *= -scale
    elif HAS_SUPERS:
        place = (num_supers + group * GROUP // 256) * n_total + columns
        minimum *= tl.load(supers_ptr + place, mask=mask, other=0.0).to(tl.float32)
    return minimum


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def gemm_codes_kernel(
    x_ptr, sums_ptr, codes_ptr, high_ptr, scales_ptr, minimums_ptr, supers_ptr, table_ptr, bias_ptr, out_ptr,
    partial_ptr, tile_experts_ptr, pairs_ptr, num_rows, num_tokens, n_rows, n_total, k, num_steps, steps_a_split,
    num_supers,
    BITS: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    VALUES: tl.constexpr, MINIMUMS: tl.constexpr, HAS_SUPERS: tl.constexpr, IS_EVEN: tl.constexpr,
    TOP_K: tl.constexpr, NUM_SPLITS: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[row] = x[row] @ weight.T (+ bias) for a tile. x [tokens, k] bfloat16; sums [groups, tokens] float32.

    Reads bits / 8 bytes a weight and group headers once a tile of tokens; 2 k operations an output.
    """
    STEP: tl.constexpr = FIELDS * LANES
    COUNT: tl.constexpr = STEP // GROUP if GROUP < STEP else 1
    WORDS: tl.constexpr = LANES if BITS == 8 else LANES // 2
    rows, out_rows, exists, first = tile_rows(
        tile_experts_ptr, pairs_ptr, num_rows, tl.program_id(0), n_rows, TOP_K, BLOCK_M
    )
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    n_mask = n < n_rows
    columns = first + n
    lane = tl.arange(0, LANES)
    x_ptrs = x_ptr + rows[None, :].to(tl.int64) * k + lane[:, None]
    places = columns[:, None].to(tl.int64) * WORDS + tl.arange(0, WORDS)[None, :]
    stride = n_total * WORDS
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for _ in range(1 if IS_SPLIT else NUM_SPLITS):
        begin = split * steps_a_split
        end = tl.minimum(begin + steps_a_split, num_steps)
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        scales = group_scales(
            scales_ptr, supers_ptr, begin * STEP // GROUP, columns, n_mask & (begin < end), n_total, GROUP, COUNT,
            HAS_SUPERS,
        )  # fmt: skip
        for step in range(begin, end):
            words, later, high = step_words(codes_ptr, high_ptr, places, stride, step, n_mask[:, None], BITS)
            # The scales of the next step are on their way while this one is multiplied.
            following = group_scales(
                scales_ptr, supers_ptr, (step + 1) * STEP // GROUP, columns, n_mask & (step + 1 < end), n_total, GROUP,
                COUNT, HAS_SUPERS,
            )  # fmt: skip
            for index in tl.static_range(COUNT):
                products = group_products(
                    words, later, high, table_ptr, x_ptrs + step * STEP, exists, k - step * STEP, lane, index,
                    FIELDS // COUNT, BITS, OFFSET, VALUES, IS_EVEN, BLOCK_M, BLOCK_N, LANES,
                )  # fmt: skip
                acc += products * scales[index][:, None]
                if MINIMUMS != "none":
                    group = step * STEP // GROUP + index
                    minimum = group_minimum(
                        minimums_ptr, supers_ptr, group, columns, n_mask, n_total, num_supers, scales[index], GROUP,
                        MINIMUMS, HAS_SUPERS,
                    )  # fmt: skip
                    # Inputs are summed by group, or by step where that is shorter.
                    part = group if GROUP < STEP else step
                    sums = tl.load(sums_ptr + tl.cast(part, tl.int64) * num_tokens + rows, mask=exists, other=0.0)
                    acc += minimum[:, None] * sums[None, :]
            scales = following
        total += acc
        split += 1
    store_tile(
        out_ptr, bias_ptr, partial_ptr, total, out_rows, exists, n, num_rows, n_rows, tl.program_id(2), HAS_BIAS,
        IS_SPLIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def group_sums_kernel(
    x_ptr, sums_ptr, num_tokens, k, num_groups, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr
):
    """sums [groups, tokens] float32: of each token's inputs, GROUP at a time. Reads x once."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * GROUPS * GROUP + tl.arange(0, GROUPS * GROUP)
    mask = (row < num_tokens)[:, None] & (column < k)[None, :]
    x = tl.load(x_ptr + row[:, None].to(tl.int64) * k + column[None, :], mask=mask, other=0.0).to(tl.float32)
    sums = tl.sum(x.reshape(BLOCK_M, GROUPS, GROUP), 2)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    places = group[None, :].to(tl.int64) * num_tokens + row[:, None]
    tl.store(sums_ptr + places, sums, mask=(row < num_tokens)[:, None] & (group < num_groups)[None, :])


@triton.jit
def rows_kernel(
    ids_ptr, codes_ptr, high_ptr, scales_ptr, minimums_ptr, supers_ptr, table_ptr, out_ptr, n_total, k, num_supers,
    BITS: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    VALUES: tl.constexpr, MINIMUMS: tl.constexpr, HAS_SUPERS: tl.constexpr,
):  # fmt: skip
    """out [ids, k]: rows of a weight, one step of one row a program. Moves the row's codes and its values."""
    STEP: tl.constexpr = FIELDS * LANES
    WORDS: tl.constexpr = LANES if BITS == 8 else LANES // 2
    LOW: tl.constexpr = 2 if BITS == 6 else 1
    row = tl.load(ids_ptr + tl.program_id(0))
    step = tl.program_id(1)
    lane = tl.arange(0, LANES)
    word = tl.arange(0, WORDS)[None, :]
    word_row = tl.full((1, 1), 0, tl.int64) + row
    for field in tl.static_range(FIELDS):
        low_row = step * LOW + (field // 4 if BITS == 6 else 0)
        words = tl.load(codes_ptr + (low_row * n_total + word_row) * WORDS + word)
        high = words
        if BITS == 6:
            high = tl.load(high_ptr + (step * n_total + word_row) * WORDS + word)
        values = field_values(words, high, table_ptr, field, BITS, OFFSET, VALUES, 1, LANES).to(tl.float32)
        column = step * STEP + field * LANES
        place = column // GROUP * n_total + row
        scale = tl.load(scales_ptr + place).to(tl.float32)
        super_place = column // 256 * n_total + row
        if HAS_SUPERS:
            scale *= tl.load(supers_ptr + super_place).to(tl.float32)
        values *= scale
        if MINIMUMS != "none":
            minimum = tl.load(minimums_ptr + place).to(tl.float32)
            if MINIMUMS == "point":
                minimum *= -scale
            elif HAS_SUPERS:
                minimum *= tl.load(supers_ptr + num_supers * n_total + super_place).to(tl.float32)
            values += minimum
        out_ptrs = out_ptr + tl.program_id(0).to(tl.int64) * k + column + lane[None, :]
        tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=(column + lane < k)[None, :])
