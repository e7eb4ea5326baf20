"""Mixture of experts: each token meets its TOP_K experts, and every expert's matrix is read once for all its tokens.

Pairs of a token and one of its experts are sorted by expert, each expert's run padded to whole tiles, so that a tile of
the matrix kernels (gemm_codes.py, gemm_dense.py) has one expert; they gather the tokens and scatter the pairs
themselves. The outputs of a token's pairs are then added in the order of its experts, largest weight first. Nothing is
read back: the number of tiles is bounded by the shapes, and the tiles beyond the last are empty.

Limits: one token reads TOP_K experts, many read all of them: bound by memory until an expert has some hundred tokens
(H200). Routing moves a few bytes a pair. Not measured on a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from penstock.kernels.reference.experts import ReferenceExperts
from penstock.kernels.triton import configs
from penstock.kernels.triton.activation import silu_and_mul_quantize
from penstock.kernels.triton.linear import Routing, family_of, form_of, routed_linear, tile_for
from penstock.kernels.triton.specialization import Specialization, specialization

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from penstock.kernels.ops import Ops
    from penstock.kernels.packed import PackedLinear
    from penstock.kernels.quantized import QuantizedLinear
    from penstock.kernels.rounded import Activations

MAX_EXPERTS: Final = 1024
_PAIRS_BLOCK: Final = 1024
_COLUMNS_BLOCK: Final = 1024


@triton.jit
def top_k_kernel(
    logits_ptr,
    experts_ptr,
    weights_ptr,
    num_experts,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A token's TOP_K most probable experts (of equals the lower number) and softmax weights, float32.

    RENORMALIZE: the weights are divided by their sum. logits [T, experts] float32 or bfloat16.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    is_one = expert < num_experts
    logits = tl.load(logits_ptr + token * num_experts + expert, mask=is_one, other=float("-inf")).to(tl.float32)
    left = tl.where(is_one, tl.exp(logits - tl.max(logits, 0)), -1.0)
    total = tl.sum(tl.where(is_one, left, 0.0), 0)
    chosen_total = 0.0
    for place in tl.static_range(TOP_K):
        most = tl.max(left, 0)
        best = tl.min(tl.where(left == most, expert, BLOCK), 0)
        best = tl.minimum(best, num_experts - 1)  # logits that are NaN choose the last
        chosen_total += most
        tl.store(experts_ptr + token * TOP_K + place, best)
        tl.store(weights_ptr + token * TOP_K + place, most / total)
        left = tl.where(expert == best, -1.0, left)
    if RENORMALIZE:
        for place in tl.static_range(TOP_K):
            weight = tl.load(weights_ptr + token * TOP_K + place)
            tl.store(weights_ptr + token * TOP_K + place, weight * (total / chosen_total))


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(experts_ptr, counts_ptr, num_pairs, BLOCK: tl.constexpr):
    """counts[expert]: its pairs, one expert a program."""
    expert = tl.program_id(0)
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, num_pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        count += (tl.load(experts_ptr + pair, mask=pair < num_pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(count, 0))


@triton.jit(do_not_specialize=["num_pairs"])
def sort_kernel(
    experts_ptr, counts_ptr, pairs_ptr, tile_experts_ptr, num_pairs, num_experts,
    BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes one expert's pairs in rising order from its first tile on; a program an expert."""
    expert = tl.program_id(0)
    other = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + other, mask=other < num_experts, other=0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.sum(tl.where(other < expert, tiles, 0), 0)
    own_tiles = tl.sum(tl.where(other == expert, tiles, 0), 0)
    for tile in range(own_tiles):
        tl.store(tile_experts_ptr + first_tile + tile, expert)
    place = first_tile * BLOCK_M
    for first in range(0, num_pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        is_own = tl.load(experts_ptr + pair, mask=pair < num_pairs, other=-1) == expert
        rank = tl.cumsum(is_own.to(tl.int32), 0)
        tl.store(pairs_ptr + place + rank - 1, pair, mask=is_own)
        place += tl.sum(is_own.to(tl.int32), 0)


@triton.jit
def combine_kernel(pairs_out_ptr, weights_ptr, out_ptr, columns, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out[token] = the sum of its pairs' rows times their weights, in order, in float32. Reads TOP_K rows a token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in tl.static_range(TOP_K):
        row = token * TOP_K + place
        value = tl.load(pairs_out_ptr + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        total += value * tl.load(weights_ptr + row)
    tl.store(out_ptr + token * columns + column, total.to(out_ptr.dtype.element_ty), mask=mask)


class TritonExperts(ReferenceExperts):
    """See ExpertOps in kernels/ops.py."""

    def __init__(self, ops: Ops, *, row_invariant: bool = False) -> None:
        super().__init__(ops)
        self._row_invariant = row_invariant

    def choose(self, logits_TE: Tensor, top_k: int, *, is_renormalized: bool) -> tuple[Tensor, Tensor]:
        return choose_experts(logits_TE, top_k, renormalize=is_renormalized)

    def combine(self, pairs_PN: Tensor, weights_TK: Tensor) -> Tensor:
        return combine(pairs_PN, weights_TK)

    def mlp(
        self,
        x_TD: Tensor,
        chosen: tuple[Tensor, Tensor],
        gate_up: PackedLinear | QuantizedLinear,
        down: PackedLinear | QuantizedLinear,
        num_experts: int,
    ) -> Tensor:
        form = form_of(down)
        activate = self._ops.silu_and_mul if form is None else partial(silu_and_mul_quantize, form=form)
        return experts_mlp(x_TD, chosen, gate_up, down, num_experts, activate, row_invariant=self._row_invariant)


def choose_experts(logits_TE: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """(experts int32 [T, top_k], weights float32 [T, top_k]), the most probable first."""
    tokens, num_experts = logits_TE.shape
    assert 1 <= top_k <= num_experts <= MAX_EXPERTS, (top_k, num_experts)
    experts = torch.empty((tokens, top_k), dtype=torch.int32, device=logits_TE.device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits_TE.device)
    if tokens:
        top_k_kernel[(tokens,)](
            logits_TE, experts, weights, num_experts, TOP_K=top_k, RENORMALIZE=renormalize,
            BLOCK=triton.next_power_of_2(num_experts), num_warps=1,
        )  # fmt: skip
    return experts, weights


def route(experts_TK: Tensor, num_experts: int, block_m: int) -> Routing:
    """Pairs sorted by expert, in tiles of block_m. experts: int32, each in [0, num_experts)."""
    tokens, top_k = experts_TK.shape
    num_pairs = tokens * top_k
    # Each expert with a pair wastes less than a tile.
    num_tiles = num_pairs // block_m + min(num_experts, num_pairs)
    device = experts_TK.device
    tile_experts = torch.full((num_tiles,), -1, dtype=torch.int32, device=device)
    pairs = torch.full((num_tiles * block_m,), num_pairs, dtype=torch.int32, device=device)
    if num_pairs:
        counts = torch.empty((num_experts,), dtype=torch.int32, device=device)
        count_kernel[(num_experts,)](experts_TK, counts, num_pairs, BLOCK=_PAIRS_BLOCK)
        sort_kernel[(num_experts,)](
            experts_TK, counts, pairs, tile_experts, num_pairs, num_experts, BLOCK_M=block_m,
            EXPERTS=triton.next_power_of_2(num_experts), BLOCK=_PAIRS_BLOCK,
        )  # fmt: skip
    return Routing(tile_experts, pairs, num_pairs, num_experts, top_k, block_m)


def combine(pairs_out_PN: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's pairs -> [T, N]."""
    tokens, top_k = weights_TK.shape
    columns = pairs_out_PN.shape[1]
    out = torch.empty((tokens, columns), dtype=pairs_out_PN.dtype, device=pairs_out_PN.device)
    if tokens:
        combine_kernel[(tokens, triton.cdiv(columns, _COLUMNS_BLOCK))](
            pairs_out_PN, weights_TK, out, columns, TOP_K=top_k, BLOCK=_COLUMNS_BLOCK
        )
    return out


def experts_mlp(
    x_TK: Tensor,
    chosen: tuple[Tensor, Tensor],
    gate_up: PackedLinear | QuantizedLinear,
    down: PackedLinear | QuantizedLinear,
    num_experts: int,
    activate: Callable[[Tensor], Activations],
    *,
    row_invariant: bool = False,
) -> Tensor:
    """sum over a token's experts of weight * down(activate(gate_up(x))) -> [T, K]. chosen: of choose_experts.

    gate_up [experts * 2 I, K], down [experts * K, I]: the experts below each other. activate: [P, 2 I] -> [P, I], or
    that in the form of `down`.
    """
    experts_TK, weights_TK = chosen
    tokens, top_k = experts_TK.shape
    # A tile as for the tokens that an expert has on average: the same for both matrices, which share the sorting.
    card, num_each = configs.of_device(x_TK.device), triton.cdiv(tokens * top_k, num_experts)
    tile = tile_for(card, family_of(gate_up), num_each, row_invariant=row_invariant)
    routing = route(experts_TK, num_experts, tile.block_m)
    hidden = activate(routed_linear(x_TK, gate_up, routing, row_invariant=row_invariant))
    # Of the second matrix every pair is a token of its own.
    out = routed_linear(hidden, down, routing._replace(top_k=1), row_invariant=row_invariant)
    return combine(out, weights_TK)


def specializations() -> Iterator[Specialization]:
    """128 experts, 8 a token."""
    yield specialization(
        "experts top 8 of 128", top_k_kernel,
        {"logits_ptr": "*bf16", "experts_ptr": "*i32", "weights_ptr": "*fp32", "num_experts": "i32"},
        {"TOP_K": 8, "RENORMALIZE": True, "BLOCK": 128}, (1, 1), aligned=("num_experts",),
    )  # fmt: skip
    pointers = {"experts_ptr": "*i32", "counts_ptr": "*i32", "num_pairs": "i32"}
    yield specialization("experts count", count_kernel, pointers, {"BLOCK": _PAIRS_BLOCK}, (4, 3))
    yield specialization(
        "experts sort", sort_kernel,
        pointers | {"pairs_ptr": "*i32", "tile_experts_ptr": "*i32", "num_experts": "i32"},
        {"BLOCK_M": 16, "EXPERTS": 128, "BLOCK": _PAIRS_BLOCK}, (4, 3),
    )  # fmt: skip
    yield specialization(
        "experts combine", combine_kernel,
        {"pairs_out_ptr": "*bf16", "weights_ptr": "*fp32", "out_ptr": "*bf16", "columns": "i32"},
        {"TOP_K": 8, "BLOCK": _COLUMNS_BLOCK}, (4, 3), aligned=("columns",),
    )  # fmt: skip
