"""Mixtures of experts in one call: the references' results, and a token's bits among any others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from penstock.kernels import ops as op_table
from penstock.kernels.expert_stack import ExpertStack
from penstock.kernels.quantized import (
    GGUF_LAYOUTS,
    INT8_CHANNEL,
    NF4,
    Q4_K,
    Q6_K,
    Q8_0,
    W8A8,
    QuantizedLinear,
    WeightLayout,
    fp8,
    w4a16,
)
from penstock.kernels.reference.experts import ReferenceExperts
from penstock.kernels.reference.gguf_blocks import BLOCKS

if TYPE_CHECKING:
    from penstock.kernels.ops import Ops
    from penstock.kernels.packed import PackedLinear

LAYOUTS = {
    "float": None, "int8": INT8_CHANNEL, "w8a8": W8A8, "q4_0": GGUF_LAYOUTS[2], "q8_0": GGUF_LAYOUTS[Q8_0],
    "q4_k": GGUF_LAYOUTS[Q4_K], "q6_k": GGUF_LAYOUTS[Q6_K], "w4a16": w4a16(128), "gptq": w4a16(32, "f16", "point"),
    "fp8": fp8("e4m3", 128), "nf4": NF4,
}  # fmt: skip
EXPERTS, TOP_K = 7, 3


def random_matrix(ops: Ops, layout: WeightLayout | None, n: int, k: int, dtype: torch.dtype) -> object:
    """A packed [n, k] of random codes, the same for any ops after the same seed."""
    if layout is None:
        return op_table.pack_linear(ops, [torch.randn(n, k) * k**-0.5], dtype)
    packed = ops.layouts.empty_quantized(n, k, layout, dtype)
    types = [kind for kind, its_layout in GGUF_LAYOUTS.items() if its_layout == layout and layout.scales == "super"]
    if types:
        inputs, block_bytes, _ = BLOCKS[types[0]]
        blocks = torch.randint(0, 256, (n, k // inputs, block_bytes), dtype=torch.uint8)
        scales = {Q4_K: slice(0, 4), Q6_K: slice(208, 210)}[types[0]]
        small = (torch.rand(n, k // inputs, (scales.stop - scales.start) // 2) * 1e-3).half()
        blocks[:, :, scales] = small.view(torch.uint8)
        ops.pack_gguf(packed, 0, blocks.view(n, -1), types[0])
        return packed
    groups = -(-k // layout.group_size) if layout.group_size else 1
    codes = torch.randint(0, 1 << layout.bits, (n, k), dtype=torch.uint8)
    if layout.values == "e4m3":
        codes[(codes & 127) == 127] = 1
    scales_RG = (torch.rand(n, groups) * 2.0 ** (-1 - layout.bits) * k**-0.5).half().float()
    points = torch.randint(0, 16, (n, groups)).float() if layout.minimums == "point" else None
    ops.pack_parts(packed, 0, codes, scales_RG, points)
    return packed


def experts_of(
    ops: Ops, layout: WeightLayout | None, dtype: torch.dtype, hidden: int, inner: int
) -> tuple[ExpertStack, ExpertStack]:
    torch.manual_seed(1)
    stacks = []
    for n, k in ((2 * inner, hidden), (hidden, inner)):
        matrices: list[PackedLinear | QuantizedLinear] = [
            random_matrix(ops, layout, n, k, dtype)
            for _ in range(EXPERTS)  # type: ignore[misc]
        ]
        stack = ExpertStack.of(matrices)
        assert stack is not None
        stacks.append(stack)
    return stacks[0], stacks[1]


def inputs(tokens: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    logits[:, 4] = -9.0  # an expert of which no token is
    return torch.randn(tokens, hidden, generator=generator).to(dtype), logits


@pytest.mark.parametrize("is_renormalized", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 1), (5, 5, 5), (9, 60, 6), (3, 128, 8), (0, 4, 2)], ids=str)
def test_the_most_probable_are_chosen(native: Ops, shape: tuple[int, int, int], is_renormalized: bool) -> None:
    tokens, count, top_k = shape
    torch.manual_seed(0)
    logits = torch.randn(tokens, count) * 3
    experts, weights = native.experts.choose(logits, top_k, is_renormalized=is_renormalized)
    expected, expected_weights = op_table.load("reference", 1).experts.choose(
        logits, top_k, is_renormalized=is_renormalized
    )
    assert torch.equal(experts, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)


def test_equals_are_taken_in_order_and_what_is_no_number_is_no_expert_beyond_the_last(native: Ops) -> None:
    logits = torch.zeros(3, 21)
    logits[1] = torch.nan
    logits[2, 3] = torch.inf
    experts, weights = native.experts.choose(logits, 4, is_renormalized=False)
    assert experts[0].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(weights[0], torch.full((4,), 1 / 21))
    for row in experts.tolist():
        assert len(set(row)) == 4
        assert all(0 <= expert < 21 for expert in row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_experts_in_one_call_are_the_same_one_by_one(native: Ops, name: str, dtype: torch.dtype) -> None:
    """Bit for bit, with the same kernels; and what torch makes of it, nearly."""
    hidden, inner = 256, 256
    gate_up, down = experts_of(native, LAYOUTS[name], dtype, hidden, inner)
    reference = op_table.load("reference", 1)
    theirs = experts_of(reference, LAYOUTS[name], dtype, hidden, inner)
    for tokens in (0, 1, 2, 37):
        x, logits = inputs(tokens, hidden, dtype)
        chosen = native.experts.choose(logits, TOP_K, is_renormalized=True)
        out = native.experts.mlp_of_each(x, chosen, gate_up, down)
        assert out.shape == x.shape
        if not tokens:
            continue
        one_by_one = ReferenceExperts(native).mlp_of_each(x, chosen, gate_up, down)
        assert torch.equal(out, one_by_one)
        expected = reference.experts.mlp_of_each(x, chosen, *theirs).float()
        assert (out.float() - expected).norm() <= (1e-4 if dtype is torch.float32 else 0.03) * expected.norm()


@pytest.mark.parametrize("sizes", [(60, 44), (63, 45), (64, 16)], ids=str)
def test_odd_sizes(native: Ops, sizes: tuple[int, int]) -> None:
    gate_up, down = experts_of(native, None, torch.bfloat16, *sizes)
    x, logits = inputs(19, sizes[0], torch.bfloat16)
    chosen = native.experts.choose(logits, TOP_K, is_renormalized=False)
    expected = ReferenceExperts(native).mlp_of_each(x, chosen, gate_up, down)
    assert torch.equal(native.experts.mlp_of_each(x, chosen, gate_up, down), expected)


@pytest.mark.parametrize("name", ["float", "q4_0", "q6_k", "w4a16"])
def test_a_tokens_bits_depend_on_no_other(native: Ops, name: str) -> None:
    gate_up, down = experts_of(native, LAYOUTS[name], torch.bfloat16, 256, 256)
    x, logits = inputs(90, 256, torch.bfloat16)

    def run(rows: slice, ops: Ops = native) -> torch.Tensor:
        chosen = ops.experts.choose(logits[rows], TOP_K, is_renormalized=True)
        return ops.experts.mlp_of_each(x[rows], chosen, gate_up, down)

    together = run(slice(0, 90))
    for rows in (slice(7, 8), slice(20, 23), slice(30, 87)):
        assert torch.equal(run(rows), together[rows])
        assert torch.equal(run(rows, op_table.load("native", 1, isa=native.isa)), together[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_expert_of_all_tokens_is_added(native: Ops, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mixed, shared = torch.randn(11, 45).to(dtype), torch.randn(11, 45).to(dtype)
    logits = torch.tensor([-200.0, -90.0, -3.0, -0.5, 0.0, 0.1, 2.0, 9.0, 90.0, 200.0, torch.inf])[:, None]
    expected = mixed.double() + torch.sigmoid(logits.double()) * shared.double()
    found = native.experts.add_shared(mixed, logits, shared)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), expected, rtol=4e-3 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)
    assert torch.equal(native.experts.add_shared(mixed[3:5], logits[3:5], shared[3:5]), found[3:5])


def test_weights_that_are_not_alike_are_no_stack() -> None:
    ops = op_table.load("reference", 1)
    one, other = (ops.layouts.empty_linear(16, k, torch.float32) for k in (8, 10))
    quantised = ops.layouts.empty_quantized(16, 8, INT8_CHANNEL, torch.float32)
    assert ExpertStack.of([one, one]) is not None
    assert ExpertStack.of([one, other]) is None
    assert ExpertStack.of([one, quantised]) is None
