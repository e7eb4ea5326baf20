"""Experts that are not alike, in format or in the order of their columns, go one by one, and give what others do."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels import ops as op_table
from penstock.kernels.ops import Ops, pack_linear
from penstock.kernels.quantized import INT4, INT8_CHANNEL, QuantizedLinear
from penstock.quantization.expert_weights import SeparateExperts
from penstock.quantization.packed_weight import PackedWeight, SplitWeight

HIDDEN, INNER, EXPERTS, TOP_K = 64, 32, 4, 2


def one_by_one(gate_up: list[torch.Tensor], down: list[torch.Tensor], x: torch.Tensor, chosen) -> torch.Tensor:
    out = torch.zeros_like(x)
    for token, (experts, shares) in enumerate(zip(*(part.tolist() for part in chosen), strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            out[token] += share * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.fixture(params=["native", "reference"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return op_table.load(request.param, 1)


@pytest.mark.parametrize("kind", ["alike", "one in an order", "gate and up apart", "one in another format"])
def test_experts_of_any_kind(ops: Ops, kind: str) -> None:
    torch.manual_seed(0)
    gate_up = [torch.randn(2 * INNER, HIDDEN) * HIDDEN**-0.5 for _ in range(EXPERTS)]
    down = [torch.randn(HIDDEN, INNER) * INNER**-0.5 for _ in range(EXPERTS)]

    def packed(matrix: torch.Tensor) -> PackedWeight:
        return PackedWeight(pack_linear(ops, [matrix], torch.float32))

    gate_ups: list[PackedWeight | SplitWeight] = [packed(matrix) for matrix in gate_up]
    downs = [packed(matrix) for matrix in down]
    if kind == "one in an order":
        order = torch.randperm(HIDDEN)
        gate_ups[2] = PackedWeight(pack_linear(ops, [gate_up[2][:, order]], torch.float32), order)
    if kind == "gate and up apart":
        gate_ups = [SplitWeight([packed(matrix[:INNER]), packed(matrix[INNER:])]) for matrix in gate_up]
    if kind == "one in another format":
        other = ops.layouts.empty_quantized(HIDDEN, INNER, INT8_CHANNEL, torch.float32)
        ops.quantize_into(other, 0, down[1])
        downs[1], down[1] = PackedWeight(other), ops.dequantize(other)
    x = torch.randn(23, HIDDEN)
    chosen = ops.experts.choose(torch.randn(23, EXPERTS), TOP_K, is_renormalized=True)
    found = SeparateExperts(gate_ups, downs).mlp(x, chosen, ops)
    expected = one_by_one(gate_up, down, x, chosen)
    assert (found - expected).norm() <= (0.02 if kind == "one in another format" else 1e-5) * expected.norm()


def test_experts_lie_side_by_side(ops: Ops) -> None:
    """Experts in 4 bits side by side in memory, as a checkpoint's are, each with its own scales."""
    torch.manual_seed(0)
    matrices = [[torch.randn(n, k) for _ in range(EXPERTS)] for n, k in ((2 * INNER, HIDDEN), (HIDDEN, INNER))]
    stacks: list[list[QuantizedLinear]] = []
    for each in matrices:
        stacks.append([ops.layouts.empty_quantized(*each[0].shape, INT4, torch.float32) for _ in each])
        for linear, matrix in zip(stacks[-1], each, strict=True):
            ops.quantize_into(linear, 0, matrix)
    x = torch.randn(9, HIDDEN)
    chosen = ops.experts.choose(torch.randn(9, EXPERTS), TOP_K, is_renormalized=False)
    found = SeparateExperts(*([PackedWeight(linear) for linear in stack] for stack in stacks)).mlp(x, chosen, ops)
    values = [[ops.dequantize(linear) for linear in stack] for stack in stacks]
    expected = one_by_one(*values, x, chosen)
    assert (found - expected).norm() <= 0.03 * expected.norm()
