"""Routing and grouped products of a mixture of experts, in the interpreter, against plain loops."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels import ops as op_table
from penstock.kernels.packed import PackedLinear
from penstock.kernels.quantized import INT4, INT8_CHANNEL, QuantizedLinear, WeightLayout, fp8, w4a16
from penstock.kernels.reference.quantized import values_of
from penstock.kernels.triton import moe, packing, weights


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up).bfloat16()


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 1), (7, 5, 2), (3, 60, 6)], ids=str)
def test_experts_are_the_most_probable(shape: tuple[int, int, int], renormalize: bool) -> None:
    tokens, num_experts, top_k = shape
    logits = torch.randn(tokens, num_experts)
    experts, shares = moe.choose_experts(logits, top_k, renormalize=renormalize)
    expected, places = torch.softmax(logits, 1).topk(top_k)
    if renormalize:
        expected /= expected.sum(1, keepdim=True)
    assert torch.equal(experts.long(), places)
    torch.testing.assert_close(shares, expected)


def test_equals_are_taken_in_order() -> None:
    experts, shares = moe.choose_experts(torch.zeros(2, 5), 3, renormalize=False)
    assert experts.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(shares, torch.full((2, 3), 0.2))


@pytest.mark.parametrize("tokens", [0, 1, 700])
def test_pairs_are_sorted_in_whole_tiles(tokens: int) -> None:
    experts = torch.randint(0, 6, (tokens, 2), dtype=torch.int32)
    experts[experts == 3] = 4  # one expert has no token
    routing = moe.route(experts, 6, 16)
    of_tile = routing.tile_experts.tolist()
    tiles = routing.pairs.view(-1, 16).tolist()
    found: dict[int, list[int]] = {expert: [] for expert in range(-1, 6)}
    for expert, tile in zip(of_tile, tiles, strict=True):
        found[expert] += [pair for pair in tile if pair != 2 * tokens]
    assert found.pop(-1) == []
    flat = experts.flatten()
    assert found == {expert: (flat == expert).nonzero()[:, 0].tolist() for expert in range(6)}
    assert [expert for expert in of_tile if expert >= 0] == sorted(expert for expert in of_tile if expert >= 0)


def random_experts(layout: WeightLayout | None, n: int, k: int) -> tuple[object, torch.Tensor]:
    """A packed [n, k] and its values."""
    values = torch.randn(n, k) * k**-0.5
    if layout is None:
        weight = weights.empty_linear(n, k, torch.bfloat16, "cpu")
        packing.pack_into(weight, 0, values)
        return weight, weight.data.float()
    packed = weights.empty_quantized(n, k, layout, torch.bfloat16, "cpu")
    groups = -(-k // layout.group_size)
    codes = torch.randint(0, 1 << layout.bits, (n, k), dtype=torch.uint8)
    codes[(codes & 127) == 127] = 1
    scales = (torch.rand(n, groups) * (0.01 if layout.bits == 4 else 1e-3)).half().float()
    packing.pack_parts(packed, 0, codes, scales)
    return packed, values_of(layout, torch.bfloat16)[codes.long()] * scales.repeat_interleave(layout.group_size, 1)[
        :, :k
    ]


@pytest.mark.parametrize("layout", [None, w4a16(32), fp8("e4m3", 128)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 21])
def test_mlp_is_the_plain_loops(layout: WeightLayout | None, tokens: int) -> None:
    num_experts, top_k, k, inner = 5, 2, 128, 96
    gate_up, gate_up_values = random_experts(layout, num_experts * 2 * inner, k)
    down, down_values = random_experts(layout, num_experts * k, inner)
    x = torch.randn(tokens, k, dtype=torch.bfloat16)
    chosen = moe.choose_experts(torch.randn(tokens, num_experts), top_k, renormalize=True)
    out = moe.experts_mlp(x, chosen, gate_up, down, num_experts, silu_and_mul)  # type: ignore[arg-type]
    expected = torch.zeros(tokens, k)
    for token in range(tokens):
        for expert, share in zip(*(part[token].tolist() for part in chosen), strict=True):
            first = gate_up_values.view(num_experts, 2 * inner, k)[expert]
            second = down_values.view(num_experts, k, inner)[expert]
            hidden = silu_and_mul((x[token].float() @ first.T)[None])
            expected[token] += share * (hidden.float() @ second.T)[0]
    # Activations in e4m3 are rounded to three bits.
    tolerance = 0.08 if layout is not None and layout.bits == 8 else 0.01
    assert out.shape == (tokens, k)
    assert (out.float() - expected).norm() <= tolerance * expected.norm()


def test_a_tokens_bits_do_not_depend_on_the_others() -> None:
    num_experts, k, inner = 4, 64, 32
    gate_up, _ = random_experts(w4a16(32), num_experts * 2 * inner, k)
    down, _ = random_experts(w4a16(32), num_experts * k, inner)
    x, logits = torch.randn(40, k, dtype=torch.bfloat16), torch.randn(40, num_experts)

    def run(rows: slice) -> torch.Tensor:
        chosen = moe.choose_experts(logits[rows], 2, renormalize=True)
        return moe.experts_mlp(x[rows], chosen, gate_up, down, num_experts, silu_and_mul)  # type: ignore[arg-type]

    together = run(slice(0, 40))
    assert torch.equal(run(slice(7, 8)), together[7:8])
    assert torch.equal(run(slice(30, 39)), together[30:39])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("floats", torch.float32), ("floats", torch.bfloat16), ("int8", torch.bfloat16), ("int4", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_the_op_table_gives_what_the_references_do(kind: str, dtype: torch.dtype, batch_invariant: bool) -> None:
    num_experts, k, inner, tokens = 3, 64, 32, 17
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, k, generator=generator).to(dtype)
    logits = torch.randn(tokens, num_experts, generator=generator)
    matrices = [
        torch.randn(rows, columns, generator=generator) * columns**-0.5
        for rows, columns in ((num_experts * 2 * inner, k), (num_experts * k, inner))
    ]
    results = []
    for ops in (op_table.load("triton", 1, batch_invariant=batch_invariant), op_table.load("reference", 1)):
        packed: list[PackedLinear | QuantizedLinear] = []
        for matrix in matrices:
            if kind == "floats":
                packed.append(op_table.pack_linear(ops, [matrix], dtype))
            else:
                layout = INT8_CHANNEL if kind == "int8" else INT4
                packed.append(ops.layouts.empty_quantized(*matrix.shape, layout, dtype))
                ops.quantize_into(packed[-1], 0, matrix)
        chosen = ops.experts.choose(logits, 2, is_renormalized=True)
        results.append((chosen[0], ops.experts.mlp(x, chosen, packed[0], packed[1], num_experts).float()))
    (experts, found), (expected_experts, expected) = results
    assert torch.equal(experts, expected_experts)
    tolerance = 1e-5 if kind == "floats" and dtype is torch.float32 else 0.02  # activations are rounded otherwise
    assert (found - expected).norm() <= tolerance * expected.norm()
