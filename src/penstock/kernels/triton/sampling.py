"""Choosing tokens without sorting the vocabulary, and log-probabilities. One program a row.

Sums are of integers: a weight is a multiple of 2^-42 of the likeliest token's. They are the same in any order, so that
a draw follows from its own row alone, and thresholds are exact: top-k and top-p search for the logit (as an integer
that orders like it) above which enough is left, three candidates a reading, and stop when one token is between.

Limit: memory, of one multiprocessor a row. A reading is 4 V bytes, from L2 after the first: greedy 1, temperature 3,
top-k and top-p about 10 more each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from penstock.kernels.triton.specialization import Specialization, specialization

if TYPE_CHECKING:
    from torch import Tensor

# 8 values a thread leave room for three sums of each; 7 readings of 8 KB on their way feed one multiprocessor from L2.
_BLOCK: Final = 2048
_WARPS: Final = 8
_STAGES: Final = 8
_MAX_VOCAB: Final = 2**20  # weights of 42 bits, summed in 63
_MASK_BLOCK: Final = 1024
_SETTING_DTYPES: Final = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float64)


@triton.jit
def order_of(x):
    """An int32 that orders as the float x does; 0 and -0 are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weight(x, best, temperature):
    return tl.exp((x - best) / temperature)


@triton.jit
def _units(weight):
    """A weight of at most 1 in units of 2^-42."""
    return (weight * 4398046511104.0).to(tl.int64)


@triton.jit
def _load(row_ptr, start, vocab, BLOCK: tl.constexpr):
    ids = start + tl.arange(0, BLOCK)
    return ids, tl.load(row_ptr + ids, mask=ids < vocab, other=-float("inf"))


@triton.jit
def _largest(row_ptr, vocab, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """(largest logit, the first id that has it, whether the row is usable: no NaN, no +inf, something finite)."""
    lane_best = tl.full((BLOCK,), -float("inf"), tl.float32)
    lane_id = tl.zeros((BLOCK,), tl.int32)
    lane_bad = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        ids, x = _load(row_ptr, start, vocab, BLOCK)
        better = x > lane_best
        lane_best = tl.where(better, x, lane_best)
        lane_id = tl.where(better, ids, lane_id)
        lane_bad = tl.where((x != x) | (x == float("inf")), 1, lane_bad)
    best = tl.max(lane_best, 0)
    first = tl.min(tl.where(lane_best == best, lane_id, 2147483647), 0)
    return best, first, (tl.max(lane_bad, 0) == 0) & (best > -float("inf"))


@triton.jit
def _threshold(
    row_ptr, vocab, best, temperature, low, target, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """The largest order such that tokens of at least it are `target` many or, BY_WEIGHT, weigh as much.

    low: an order of which this is true. Of a count, any order that leaves out the same tokens. int64.
    """
    high = order_of(best).to(tl.int64) + 1
    low_count = vocab + 2
    high_count = 0
    while (high - low > 1) & (low_count - high_count > 1) & (BY_WEIGHT | (low_count != target)):
        step = tl.maximum((high - low) // 4, 1)
        first = low + step
        second = tl.minimum(first + step, high - 1)
        third = tl.minimum(second + step, high - 1)
        counts_1 = tl.zeros((BLOCK,), tl.int32)
        counts_2 = tl.zeros((BLOCK,), tl.int32)
        counts_3 = tl.zeros((BLOCK,), tl.int32)
        units_1 = tl.zeros((BLOCK,), tl.int64)
        units_2 = tl.zeros((BLOCK,), tl.int64)
        units_3 = tl.zeros((BLOCK,), tl.int64)
        for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            ids, x = _load(row_ptr, start, vocab, BLOCK)
            order = order_of(x)
            above_1 = (order >= first.to(tl.int32)) & (ids < vocab)
            above_2 = (order >= second.to(tl.int32)) & (ids < vocab)
            above_3 = (order >= third.to(tl.int32)) & (ids < vocab)
            counts_1 += above_1.to(tl.int32)
            counts_2 += above_2.to(tl.int32)
            counts_3 += above_3.to(tl.int32)
            if BY_WEIGHT:
                units = _units(_weight(x, best, temperature))
                units_1 += tl.where(above_1, units, 0)
                units_2 += tl.where(above_2, units, 0)
                units_3 += tl.where(above_3, units, 0)
        count_1, count_2, count_3 = tl.sum(counts_1, 0), tl.sum(counts_2, 0), tl.sum(counts_3, 0)
        if BY_WEIGHT:
            enough_1 = tl.sum(units_1, 0) >= target
            enough_2 = tl.sum(units_2, 0) >= target
            enough_3 = tl.sum(units_3, 0) >= target
        else:
            enough_1, enough_2, enough_3 = count_1 >= target, count_2 >= target, count_3 >= target
        high = tl.where(enough_3, high, tl.where(enough_2, third, tl.where(enough_1, second, first)))
        high_count = tl.where(enough_3, high_count, tl.where(enough_2, count_3, tl.where(enough_1, count_2, count_1)))
        low = tl.where(enough_3, third, tl.where(enough_2, second, tl.where(enough_1, first, low)))
        low_count = tl.where(enough_3, count_3, tl.where(enough_2, count_2, tl.where(enough_1, count_1, low_count)))
    if BY_WEIGHT:
        # At most one token is between: its own order, which says who its equals are.
        lane = tl.full((BLOCK,), -2147483648, tl.int32)
        for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            ids, x = _load(row_ptr, start, vocab, BLOCK)
            order = tl.where(ids < vocab, order_of(x), -2147483648)
            lane = tl.where(order < high, tl.maximum(lane, order), lane)
        low = tl.max(lane, 0).to(tl.int64)
    return low


@triton.jit
def _kept_units(x, ids, vocab, best, temperature, threshold, last_equal, min_p):
    """Units of the tokens that top-k, top-p and min-p leave; 0 of the others."""
    order = order_of(x)
    weight = _weight(x, best, temperature)
    kept = (order > threshold) | ((order == threshold) & (ids <= last_equal))
    return tl.where(kept & (weight >= min_p) & (ids < vocab), _units(weight), 0)


@triton.jit
def _total_from(
    row_ptr, vocab, best, temperature, threshold, last_equal, min_p, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """Units of all tokens that are left."""
    lanes = tl.zeros((BLOCK,), tl.int64)
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        ids, x = _load(row_ptr, start, vocab, BLOCK)
        lanes += _kept_units(x, ids, vocab, best, temperature, threshold, last_equal, min_p)
    return tl.sum(lanes, 0)


@triton.jit
def _last_equal(row_ptr, vocab, best, temperature, threshold, target, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Of the tokens at the threshold the lower ids stay, as many as the target needs: the last of them."""
    above = _total_from(row_ptr, vocab, best, temperature, threshold, -1, 0.0, BLOCK, STAGES)
    value = threshold.to(tl.int32)
    logit = (value ^ ((value >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    each = tl.maximum(_units(_weight(logit, best, temperature)), 1)
    needed = (target - above + each - 1) // each
    seen = needed * 0
    last = seen + 2147483647
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        ids, x = _load(row_ptr, start, vocab, BLOCK)
        equal = (order_of(x) == threshold) & (ids < vocab)
        rank = seen + tl.cumsum(equal.to(tl.int32), 0)
        last = tl.minimum(last, tl.min(tl.where(equal & (rank == needed), ids, 2147483647), 0))
        seen += tl.sum(equal.to(tl.int32), 0)
    return last


@triton.jit
def _draw(
    row_ptr, vocab, best, temperature, threshold, last_equal, min_p, uniform, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """The first id at which the cumulative units of what is left exceed the uniform share of their sum."""
    total = _total_from(row_ptr, vocab, best, temperature, threshold, last_equal, min_p, BLOCK, STAGES)
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    passed = total * 0
    before = passed
    chosen = 0
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        ids, x = _load(row_ptr, start, vocab, BLOCK)
        units = tl.sum(_kept_units(x, ids, vocab, best, temperature, threshold, last_equal, min_p), 0)
        here = (passed <= target) & (passed + units > target)
        chosen = tl.where(here, start, chosen)
        before = tl.where(here, passed, before)
        passed += units
    ids, x = _load(row_ptr, chosen, vocab, BLOCK)
    units = _kept_units(x, ids, vocab, best, temperature, threshold, last_equal, min_p)
    return tl.min(tl.where(before + tl.cumsum(units, 0) > target, ids, 2147483647), 0)


@triton.jit
def _sample_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, out_ptr, vocab, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row. Bytes: 4 V a reading; the module says how many there are."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * vocab
    temperature = tl.load(temperature_ptr + row)
    best, token, usable = _largest(row_ptr, vocab, BLOCK, STAGES)
    if usable & (temperature > 0.0):
        temperature = tl.maximum(temperature, 1e-30)  # keeps 0 / temperature from being 0 / 0 where it is flushed
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        threshold = tl.full((), -2147483648, tl.int64)
        last_equal = 2147483647
        if (top_k > 0) & (top_k < vocab):
            threshold = _threshold(row_ptr, vocab, best, temperature, threshold, top_k, False, BLOCK, STAGES)
        if top_p < 1.0:
            total = _total_from(row_ptr, vocab, best, temperature, threshold, last_equal, 0.0, BLOCK, STAGES)
            target = tl.maximum((top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64), 1)
            threshold = _threshold(row_ptr, vocab, best, temperature, threshold, target, True, BLOCK, STAGES)
            last_equal = _last_equal(row_ptr, vocab, best, temperature, threshold, target, BLOCK, STAGES).to(tl.int32)
        uniform = tl.load(uniform_ptr + row)
        token = _draw(row_ptr, vocab, best, temperature, threshold, last_equal, min_p, uniform, BLOCK, STAGES)
    tl.store(out_ptr + row, tl.where(usable, token, -1).to(tl.int64))


@triton.jit(do_not_specialize=["k"])
def _top_logprobs_kernel(
    logits_ptr, ids_ptr, logprobs_ptr, ranks_ptr, top_ids_ptr, top_ptr, vocab, k, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row: 2 + k readings of 4 V bytes. The k best are found one after another."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * vocab
    best, _first, _usable = _largest(row_ptr, vocab, BLOCK, STAGES)
    chosen = tl.load(row_ptr + tl.load(ids_ptr + row))
    lanes = tl.zeros((BLOCK,), tl.float32)
    larger = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        ids, x = _load(row_ptr, start, vocab, BLOCK)
        lanes += tl.exp(x - best)
        larger += (x > chosen).to(tl.int32)
    normaliser = best + tl.log(tl.sum(lanes, 0))
    tl.store(logprobs_ptr + row, chosen - normaliser)
    tl.store(ranks_ptr + row, tl.sum(larger, 0) + 1)

    last_order = tl.full((), 2147483647, tl.int32)
    last_id = tl.full((), -1, tl.int32)
    for index in range(k):
        lane_order = tl.full((BLOCK,), -2147483648, tl.int32)
        lane_id = tl.full((BLOCK,), 2147483647, tl.int32)
        for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            ids, x = _load(row_ptr, start, vocab, BLOCK)
            order = order_of(x)
            comes_after = (order < last_order) | ((order == last_order) & (ids > last_id))
            better = (ids < vocab) & comes_after & (order > lane_order)
            lane_order = tl.where(better, order, lane_order)
            lane_id = tl.where(better, ids, lane_id)
        last_order = tl.max(lane_order, 0)
        last_id = tl.min(tl.where(lane_order == last_order, lane_id, 2147483647), 0)
        tl.store(top_ids_ptr + row * k + index, last_id.to(tl.int64))
        tl.store(top_ptr + row * k + index, tl.load(row_ptr + last_id) - normaliser)


@triton.jit
def _mask_kernel(logits_ptr, rows_ptr, masks_ptr, vocab, words, BLOCK: tl.constexpr):
    """Bytes: a bit read a logit, and 4 written for each that is excluded."""
    index = tl.program_id(0)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(masks_ptr + index.to(tl.int64) * words + ids // 32, mask=ids < vocab, other=-1)
    excluded = ((word >> (ids % 32)) & 1) == 0
    row = tl.load(rows_ptr + index).to(tl.int64)
    tl.store(logits_ptr + row * vocab + ids, -float("inf"), mask=(ids < vocab) & excluded)


def _check_logits(logits_RV: Tensor) -> tuple[int, int]:
    rows, vocab = logits_RV.shape
    assert logits_RV.dtype is torch.float32 and logits_RV.is_contiguous(), (logits_RV.dtype, logits_RV.stride())
    assert 0 < vocab <= _MAX_VOCAB, vocab
    return rows, vocab


def sample(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor, uniform_R: Tensor
) -> Tensor:
    """See Ops.sample. A weight is rounded down to a multiple of 2^-42 of the largest, which smaller ones lose."""
    rows, vocab = _check_logits(logits_RV)
    settings = (temperature_R, top_k_R, top_p_R, min_p_R, uniform_R)
    for setting, dtype in zip(settings, _SETTING_DTYPES, strict=True):
        assert setting.dtype is dtype and setting.shape == (rows,), (setting.dtype, dtype, setting.shape)
        assert setting.is_contiguous(), setting.stride()
    ids = torch.empty(rows, dtype=torch.int64, device=logits_RV.device)
    if rows:
        _sample_kernel[(rows,)](logits_RV, *settings, ids, vocab, BLOCK=_block(vocab), STAGES=_STAGES, num_warps=_WARPS)
    return ids


def top_logprobs(logits_RV: Tensor, ids_R: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See Ops.top_logprobs."""
    rows, vocab = _check_logits(logits_RV)
    assert ids_R.dtype is torch.int64 and ids_R.shape == (rows,) and 0 <= k <= vocab, (ids_R.shape, k)
    device = logits_RV.device
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    ranks = torch.empty(rows, dtype=torch.int32, device=device)
    top_ids = torch.empty((rows, k), dtype=torch.int64, device=device)
    top = torch.empty((rows, k), dtype=torch.float32, device=device)
    if rows:
        _top_logprobs_kernel[(rows,)](
            logits_RV, ids_R, logprobs, ranks, top_ids, top, vocab, k, BLOCK=_block(vocab), STAGES=_STAGES,
            num_warps=_WARPS,
        )  # fmt: skip
    return logprobs, ranks, top_ids, top


def mask_logits(logits_RV: Tensor, rows_K: Tensor, masks_KW: Tensor) -> None:
    """See Ops.mask_logits; rows [K] int64 and masks [K, ceil(V / 32)] int32 are tensors on the logits' device."""
    _, vocab = _check_logits(logits_RV)
    words = triton.cdiv(vocab, 32)
    assert rows_K.dtype is torch.int64 and rows_K.is_contiguous(), rows_K.dtype
    assert masks_KW.dtype is torch.int32 and masks_KW.is_contiguous(), (masks_KW.dtype, masks_KW.stride())
    assert masks_KW.shape == (rows_K.shape[0], words), (masks_KW.shape, rows_K.shape, vocab)
    if rows_K.shape[0]:
        grid = (rows_K.shape[0], triton.cdiv(vocab, _MASK_BLOCK))
        _mask_kernel[grid](logits_RV, rows_K, masks_KW, vocab, words, BLOCK=_MASK_BLOCK, num_warps=4)


def _block(vocab: int) -> int:
    size: int = triton.next_power_of_2(vocab)
    return min(max(size, 16), _BLOCK)


def specializations() -> Iterator[Specialization]:
    """Any vocabulary of 2048 tokens and more."""
    constants = {"BLOCK": _BLOCK, "STAGES": _STAGES}
    types = dict.fromkeys(("logits_ptr", "temperature_ptr", "top_p_ptr", "min_p_ptr"), "*fp32")
    types |= {"top_k_ptr": "*i32", "uniform_ptr": "*fp64", "out_ptr": "*i64", "vocab": "i32"}
    yield specialization(
        "sample", _sample_kernel, types, constants, (_WARPS, _STAGES), aligned=("vocab",), in_test=True
    )
    types = dict.fromkeys(("logits_ptr", "logprobs_ptr", "top_ptr"), "*fp32") | {"vocab": "i32", "k": "i32"}
    types |= {"ids_ptr": "*i64", "top_ids_ptr": "*i64", "ranks_ptr": "*i32"}
    yield specialization(
        "top_logprobs", _top_logprobs_kernel, types, constants, (_WARPS, _STAGES), aligned=("vocab",), in_test=True
    )
    types = {"logits_ptr": "*fp32", "rows_ptr": "*i64", "masks_ptr": "*i32", "vocab": "i32", "words": "i32"}
    yield specialization(
        "mask_logits", _mask_kernel, types, {"BLOCK": _MASK_BLOCK}, (4, 1), aligned=("vocab",), in_test=True
    )
