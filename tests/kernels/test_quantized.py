"""Quantised linears: the reference against the gguf package and float64, the kernels against the reference."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

from penstock import _native
from penstock.kernels import ops
from penstock.kernels.native.dtypes import DTYPE_CODE
from penstock.kernels.native.quantized import layout_numbers
from penstock.kernels.quantized import (
    GGUF_LAYOUTS,
    INT4,
    INT8_CHANNEL,
    NF4,
    Q2_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q6_K,
    Q8_0,
    W8A8,
    W8A16,
    QuantizedLinear,
    WeightLayout,
    empty_quantized,
    fp8,
    w4a16,
    with_int8_activations,
)
from penstock.kernels.reference.gguf_blocks import BLOCKS
from penstock.kernels.reference.quantized import dequantize, quantize_activations, values_of

REFERENCE = ops.load("reference", 1)

PART_LAYOUTS = [
    INT4, GGUF_LAYOUTS[Q8_0], INT8_CHANNEL, W8A8, W8A16, NF4, w4a16(128), w4a16(32, "bf16"), w4a16(64, "f16", "point"),
    WeightLayout(8, 64, "float", "f16", "point"),
    w4a16(256, "f32", "point"), fp8(), fp8("e5m2", 128, "bf16"), WeightLayout(4, 64, "int8", "f32", "point"),
    WeightLayout(8, 128, "int8", "bf16", offset=128),
    # What checkpoints with 16-bit activations become with --activations int8.
    *map(with_int8_activations, (
        w4a16(128), w4a16(256, "bf16"), w4a16(128, "f16", "point"), w4a16(16, "bf16", "point"),
        WeightLayout(8, 256, "float", "f32", offset=128), WeightLayout(8, 128, "float", "f16", "point"),
    )),
]  # fmt: skip


def random_blocks(ggml_type: int, rows: int, k: int) -> torch.Tensor:
    """Rows of blocks of random bits, whose 16-bit floats are finite and of a usual size."""
    inputs, block_bytes, _ = BLOCKS[ggml_type]
    blocks = np.random.default_rng(rows + k).integers(0, 256, (rows * k // inputs, block_bytes), dtype=np.uint8)
    halves = {2: [0], 3: [0, 2], 6: [0], 7: [0, 2], 8: [0], 20: [0], 10: [80, 82], 11: [108], 12: [0, 2], 13: [0, 2],
              14: [208], 23: [0], 39: []}[ggml_type]  # fmt: skip
    for at in halves:
        scales = np.random.default_rng(at).standard_normal(len(blocks)).astype(np.float16) * np.float16(0.01)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if ggml_type == 39:
        blocks[:, 0] = blocks[:, 0] % 20 + 110
    return torch.from_numpy(blocks.reshape(rows, -1))


def random_parts(layout: WeightLayout, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales, and minimums or points."""
    groups = -(-k // layout.group_size) if layout.group_size else 1
    values = values_of(layout, torch.float32)
    codes = torch.randint(0, 1 << layout.bits, (n, k), dtype=torch.uint8)
    codes[~values[codes.long()].isfinite()] = 1
    scales = torch.randn(n, groups) * 0.01
    if layout.scales != "f32":
        scales = scales.to(torch.float16 if layout.scales == "f16" else torch.bfloat16).float()
    if layout.minimums == "none":
        return codes, scales, None
    return codes, scales, torch.randint(0, 1 << layout.bits, (n, groups)).float()


def pack_random(table: ops.Ops, layout: WeightLayout, n: int, k: int, dtype: torch.dtype) -> QuantizedLinear:
    packed = empty_quantized(n, k, layout, dtype)
    packed.steps().zero_()
    table.pack_parts(packed, 0, *random_parts(layout, n, k))
    return packed


class TestReference:
    @pytest.mark.parametrize("ggml_type", list(GGUF_LAYOUTS))
    def test_blocks_mean_what_the_gguf_package_says(self, ggml_type: int) -> None:
        blocks = random_blocks(ggml_type, 21, 512)
        packed = empty_quantized(21, 512, GGUF_LAYOUTS[ggml_type], torch.bfloat16)
        REFERENCE.pack_gguf(packed, 0, blocks[:5], ggml_type)
        REFERENCE.pack_gguf(packed, 5, blocks[5:], ggml_type)
        expected = quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(ggml_type))
        assert np.array_equal(REFERENCE.dequantize(packed).numpy(), expected)
        assert np.array_equal(REFERENCE.dequantize(packed, 7, 9).numpy(), expected[7:16])

    @pytest.mark.parametrize("layout", PART_LAYOUTS, ids=str)
    @pytest.mark.parametrize("shape", [(33, 352), (16, 64), (5, 1000)], ids=str)
    def test_parts_mean_scale_times_value(self, layout: WeightLayout, shape: tuple[int, int]) -> None:
        n, k = shape
        codes, scales, minimums = random_parts(layout, n, k)
        packed = empty_quantized(n, k, layout, torch.float32)
        REFERENCE.pack_parts(packed, 0, codes, scales, minimums)
        by_input = scales.repeat_interleave(layout.group_size or k, 1)[:, :k].double()
        points = 0 if minimums is None else minimums.repeat_interleave(layout.group_size, 1)[:, :k].double()
        expected = by_input * (values_of(layout, torch.float32)[codes.long()].double() - points)
        assert torch.allclose(dequantize(packed).double(), expected, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("ggml_type", [Q4_0, Q8_0])
    def test_rounding_is_the_gguf_packages(self, ggml_type: int) -> None:
        weight = torch.randn(40, 320)
        weight[0, :2] = torch.tensor([-8.0, 0.49999997])  # just below a half, where the order of sums tells
        packed = empty_quantized(40, 320, GGUF_LAYOUTS[ggml_type], torch.bfloat16)
        REFERENCE.quantize_into(packed, 0, weight)
        kind = gguf.GGMLQuantizationType(ggml_type)
        assert np.array_equal(
            dequantize(packed).numpy(), quants.dequantize(quants.quantize(weight.numpy(), kind), kind)
        )

    def test_rounding_a_row(self) -> None:
        weight = torch.randn(40, 320)
        packed = empty_quantized(40, 320, INT8_CHANNEL, torch.bfloat16)
        REFERENCE.quantize_into(packed, 0, weight)
        assert ((dequantize(packed) - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.501).all()

    def test_activations(self) -> None:
        x = torch.randn(3, 600)
        assert ((quantize_activations(x, 256) - x).abs() <= x.abs().amax() / 253).all()
        x[1, 300] = torch.inf
        blocks = quantize_activations(x, 256)
        assert blocks[1, 256:512].isnan().all()
        assert blocks[1, :256].isfinite().all()
        assert quantize_activations(x, 0)[1].isnan().all()
        assert not quantize_activations(torch.zeros(1, 8), 0).any()


EDGES = [
    (1, 1, 1),
    (1, 16, 64),
    (2, 33, 96),
    (7, 130, 352),
    (8, 48, 2048),
    (9, 100, 2304),
    (17, 49, 4160),
    (70, 200, 640),
]


def assert_linear_close(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Against float64: sums of k products in float32, rounded to bfloat16 at the end where that is the type."""
    exact = x.double() @ weight.double().T + bias.double()
    tolerance = (x.double().abs() @ weight.double().abs().T + bias.double().abs()) * 4e-6 + 1e-6
    if actual.dtype == torch.bfloat16:
        tolerance = tolerance + exact.abs() * 2**-8
    assert ((actual.double() - exact).abs() <= tolerance).all()


def exact_activations(x: torch.Tensor, layout: WeightLayout) -> torch.Tensor:
    return quantize_activations(x, layout.x_block) if layout.activations == "int8" else x.float()


class TestLinear:
    @pytest.mark.parametrize("layout", PART_LAYOUTS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_parity(self, native: ops.Ops, layout: WeightLayout, dtype: torch.dtype) -> None:
        for tokens, n, k in EDGES:
            packed = pack_random(native, layout, n, k, dtype)
            x, bias = torch.randn(tokens, k).to(dtype), torch.randn(n).to(dtype)
            weight, rounded = dequantize(packed), exact_activations(x, layout)
            assert_linear_close(native.linear(x, packed, bias), rounded, weight, bias)
            assert_linear_close(native.linear(x, packed, bias, torch.float32), rounded, weight, bias)
            assert_linear_close(REFERENCE.linear(x, packed, bias), rounded, weight, bias)
            assert_linear_close(native.linear(x, packed), rounded, weight, torch.zeros(n))

    @pytest.mark.parametrize("ggml_type", list(GGUF_LAYOUTS))
    def test_blocks(self, native: ops.Ops, ggml_type: int) -> None:
        for tokens, n, k in [(1, 40, 256), (11, 130, 2560)]:
            layout = GGUF_LAYOUTS[ggml_type]
            packed = empty_quantized(n, k, layout, torch.bfloat16)
            native.pack_gguf(packed, 0, random_blocks(ggml_type, n, k), ggml_type)
            x = torch.randn(tokens, k).to(torch.bfloat16)
            out = native.linear(x, packed, None, torch.float32)
            assert_linear_close(out, exact_activations(x, layout), dequantize(packed), torch.zeros(n))

    @pytest.mark.parametrize("layout", [*PART_LAYOUTS, *(GGUF_LAYOUTS[t] for t in (3, 7, 20))], ids=str)
    @pytest.mark.usefixtures("tuned")
    def test_a_row_is_the_same_in_any_batch(self, native: ops.Ops, layout: WeightLayout) -> None:
        packed = pack_random(native, layout, 200, 2500, torch.bfloat16)
        x = torch.randn(530, 2500).to(torch.bfloat16)
        alone = torch.cat([native.linear(x[i : i + 1], packed) for i in range(19)])
        for tokens in (2, 3, 4, 5, 6, 7, 8, 9, 16, 19):
            assert torch.equal(native.linear(x[:tokens], packed), alone[:tokens])
        assert torch.equal(native.linear(x, packed)[:19], alone)
        assert torch.equal(ops.load("native", 1, native.isa).linear(x[:19], packed), alone)

    @pytest.mark.parametrize("ggml_type", [Q2_K, Q4_K, Q6_K, Q8_0])
    @pytest.mark.usefixtures("tuned")
    def test_blocks_times_any_number_of_rows(self, native: ops.Ops, ggml_type: int) -> None:
        """Kernels differ in the rows that they take at once, and in where scales are made f32."""
        packed = empty_quantized(40, 512, GGUF_LAYOUTS[ggml_type], torch.bfloat16)
        native.pack_gguf(packed, 0, random_blocks(ggml_type, 40, 512), ggml_type)
        x = torch.randn(45, 512).to(torch.bfloat16)
        alone = torch.cat([native.linear(row[None], packed) for row in x])
        for rows in range(2, 46):
            assert torch.equal(native.linear(x[:rows], packed), alone[:rows])

    @pytest.mark.parametrize("layout", [INT4, GGUF_LAYOUTS[Q8_0], INT8_CHANNEL, w4a16(128), fp8()], ids=str)
    @pytest.mark.usefixtures("tuning_restored")
    def test_tuning_changes_no_bit(self, native: ops.Ops, layout: WeightLayout) -> None:
        packed = pack_random(native, layout, 200, 2560, torch.bfloat16)
        x = torch.randn(40, 2560).to(torch.bfloat16)
        _native.tune(True)
        expected = {rows: native.linear(x[:rows], packed) for rows in (1, 2, 13, 40)}
        assert _native.tune(False) is True
        for rows, rows_expected in expected.items():
            assert torch.equal(native.linear(x[:rows], packed), rows_expected)

    def test_what_is_not_finite_stays_in_its_row(self, native: ops.Ops) -> None:
        packed = pack_random(native, INT4, 40, 512, torch.bfloat16)
        x = torch.randn(3, 512)
        x[1, 300] = torch.inf
        x[2, 5] = torch.nan
        out = native.linear(x.to(torch.bfloat16), packed)
        assert out[0].isfinite().all()
        assert out[1:].isnan().all()

    @pytest.mark.parametrize("values", ["e4m3", "e5m2"])
    def test_every_fp8_code(self, native: ops.Ops, values: str) -> None:
        packed = empty_quantized(256, 256, fp8(values), torch.bfloat16)
        codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 256).contiguous()
        native.pack_parts(packed, 0, codes, torch.ones(256, 1), None)
        expected = 256.0 * codes[:, 0].view(torch.float8_e4m3fn if values == "e4m3" else torch.float8_e5m2).float()
        for tokens in (1, 2, 9):
            x = torch.ones(tokens, 256, dtype=torch.bfloat16)
            out = native.linear(x, packed, None, torch.float32)
            assert torch.equal(out.nan_to_num(7e5), expected.expand_as(out).nan_to_num(7e5))

    def test_no_rows(self, native: ops.Ops) -> None:
        packed = pack_random(native, INT4, 16, 64, torch.float32)
        assert native.linear(torch.empty(0, 64), packed).shape == (0, 16)


INTEGER_LAYOUTS = [
    *(layout for layout in (*PART_LAYOUTS, *GGUF_LAYOUTS.values()) if layout.activations == "int8"),
    *(WeightLayout(8, size, "int8", "f16", "own") for size in (16, 64, 256)),
    WeightLayout(3, 256, "int8", "f32", offset=4, x_block=0),
]


def pack_any(table: ops.Ops, layout: WeightLayout, n: int, k: int, dtype: torch.dtype) -> QuantizedLinear:
    if layout.scales != "super":
        return pack_random(table, layout, n, k, dtype)
    packed = empty_quantized(n, k, layout, dtype)
    ggml_type = next(number for number, its_layout in GGUF_LAYOUTS.items() if its_layout == layout)
    table.pack_gguf(packed, 0, random_blocks(ggml_type, n, k), ggml_type)
    return packed


class TestGated:
    @pytest.mark.usefixtures("tuned")
    @pytest.mark.parametrize("layout", [*PART_LAYOUTS, *GGUF_LAYOUTS.values()], ids=str)
    def test_the_bits_are_those_of_two_ops(self, native: ops.Ops, layout: WeightLayout) -> None:
        for n, k, dtype in [(96, 2560, torch.bfloat16), (32, 256, torch.float32), (40, 512, torch.bfloat16)]:
            packed = pack_any(native, layout, n, k, dtype)
            x, bias = torch.randn(80, k).to(dtype), torch.randn(n).to(dtype)
            expected = native.silu_and_mul(native.linear(x, packed, bias))
            for rows in (1, 2, 3, 8, 14, 33, 80):
                assert torch.equal(native.gated_linear(x[:rows], packed, bias), expected[:rows])

    def test_none_of_nothing(self, native: ops.Ops) -> None:
        packed = pack_random(native, INT4, 32, 64, torch.float32)
        assert native.gated_linear(torch.empty(0, 64), packed).shape == (0, 16)


class TestTilesEmulated:
    """The loops of the AMX kernels, over tiles that are emulated: the machines that test this have no AMX."""

    @staticmethod
    def linear(
        native: ops.Ops,
        x: torch.Tensor,
        weights: list[QuantizedLinear],
        rows: list[int] | None = None,
        is_gated: bool = False,
    ) -> torch.Tensor:
        """rows: of x that each weight is multiplied with; None: there is one weight, of all."""
        (m, k), first = x.shape, weights[0]
        out = torch.full((m, first.n // (1 + is_gated)), torch.nan, dtype=x.dtype)
        begins = [sum(rows[:i]) for i in range(len(rows))] if rows else []
        groups = [
            (weight.data.data_ptr(), begin, m - begin - count, count)
            for weight, begin, count in zip(weights, begins, rows or [], strict=False)
        ]
        _native.kernels(native.isa).quantized_linear_emulated_tiles(
            layout_numbers(first.layout, x.dtype), x.data_ptr(), first.data.data_ptr(), groups, out.data_ptr(), m,
            first.n, k, DTYPE_CODE[x.dtype], DTYPE_CODE[x.dtype], 2, is_gated,
        )  # fmt: skip
        return out

    @pytest.mark.parametrize("layout", INTEGER_LAYOUTS, ids=str)
    def test_the_bits_are_those_of_vectors(self, native: ops.Ops, layout: WeightLayout) -> None:
        for n, k, dtype in [(41, 2560, torch.bfloat16), (16, 256, torch.float32), (100, 1280, torch.float32)]:
            packed = pack_any(native, layout, n, k, dtype)
            x = torch.randn(80, k).to(dtype)
            x[3, 7] = torch.inf
            for rows in (1, 16, 33, 80):
                expected = native.linear(x[:rows], packed)
                assert torch.equal(self.linear(native, x[:rows], [packed]).nan_to_num(), expected.nan_to_num())
            assert_linear_close(expected[4:], exact_activations(x, layout)[4:], dequantize(packed), torch.zeros(n))

    @pytest.mark.parametrize("layout", [INT4, W8A8, GGUF_LAYOUTS[Q4_1]], ids=str)
    def test_any_number_of_rows(self, native: ops.Ops, layout: WeightLayout) -> None:
        packed = pack_random(native, layout, 40, 330, torch.bfloat16)
        x = torch.randn(80, 330).to(torch.bfloat16)
        expected = native.linear(x, packed)
        for rows in range(1, 81):
            assert torch.equal(self.linear(native, x[:rows], [packed]), expected[:rows])

    @pytest.mark.parametrize("layout", [INT4, W8A8, GGUF_LAYOUTS[Q8_0]], ids=str)
    def test_inputs_that_are_padded(self, native: ops.Ops, layout: WeightLayout) -> None:
        for rows, n, k in [*EDGES, (530, 50, 1100)]:
            packed = pack_random(native, layout, n, k, torch.bfloat16)
            x = torch.randn(rows, k).to(torch.bfloat16)
            assert torch.equal(self.linear(native, x, [packed]), native.linear(x, packed))

    @pytest.mark.parametrize("layout", [INT4, W8A8, GGUF_LAYOUTS[Q4_1]], ids=str)
    def test_gated(self, native: ops.Ops, layout: WeightLayout) -> None:
        packed = pack_random(native, layout, 96, 600, torch.bfloat16)
        x = torch.randn(70, 600).to(torch.bfloat16)
        expected = native.silu_and_mul(native.linear(x, packed))
        for rows in (1, 3, 17, 70):
            assert torch.equal(self.linear(native, x[:rows], [packed], is_gated=True), expected[:rows])

    @pytest.mark.parametrize("layout", [INT4, INT8_CHANNEL, GGUF_LAYOUTS[Q4_1]], ids=str)
    def test_groups_of_rows(self, native: ops.Ops, layout: WeightLayout) -> None:
        """As a mixture's experts are multiplied; here the last group's rows come first in the result."""
        counts = [1, 40, 7, 16]
        weights = [pack_random(native, layout, 70, 600, torch.bfloat16) for _ in counts]
        x = torch.randn(sum(counts), 600).to(torch.bfloat16)
        parts = [native.linear(part, weight) for part, weight in zip(x.split(counts), weights, strict=True)]
        assert torch.equal(self.linear(native, x, weights, counts), torch.cat(parts[::-1]))


class TestPacking:
    @pytest.mark.parametrize("layout", PART_LAYOUTS, ids=str)
    @pytest.mark.parametrize("shape", [(33, 352), (16, 64), (40, 1000)], ids=str)
    def test_parts(self, native: ops.Ops, layout: WeightLayout, shape: tuple[int, int]) -> None:
        n, k = shape
        parts = random_parts(layout, n, k)
        expected, actual = (empty_quantized(n, k, layout, torch.bfloat16) for _ in range(2))
        expected.steps().zero_()
        actual.steps().zero_()
        REFERENCE.pack_parts(expected, 0, *parts)
        for begin, end in ((0, 5), (5, 16), (16, n)):
            native.pack_parts(actual, begin, *(None if part is None else part[begin:end] for part in parts))
        assert torch.equal(actual.data, expected.data)
        assert torch.equal(native.dequantize(actual), dequantize(expected))
        assert torch.equal(native.dequantize(actual, 3, 9), dequantize(expected)[3:12])
        ids = torch.randint(0, n, (77,))
        assert torch.equal(native.embedding(ids, actual), dequantize(expected)[ids].to(torch.bfloat16))

    @pytest.mark.parametrize("ggml_type", list(GGUF_LAYOUTS))
    def test_blocks(self, native: ops.Ops, ggml_type: int) -> None:
        blocks = random_blocks(ggml_type, 37, 768)
        expected, actual = (empty_quantized(37, 768, GGUF_LAYOUTS[ggml_type], torch.bfloat16) for _ in range(2))
        expected.steps().zero_()
        actual.steps().zero_()
        REFERENCE.pack_gguf(expected, 0, blocks, ggml_type)
        native.pack_gguf(actual, 20, blocks[20:], ggml_type)
        native.pack_gguf(actual, 0, blocks[:20], ggml_type)
        assert torch.equal(actual.data, expected.data)
        assert torch.equal(native.dequantize(actual), dequantize(expected))

    @pytest.mark.parametrize("layout", [INT4, GGUF_LAYOUTS[Q8_0], INT8_CHANNEL, W8A8], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_rounding(self, native: ops.Ops, layout: WeightLayout, dtype: torch.dtype) -> None:
        weight = torch.randn(37, 352).to(dtype)
        weight[3] = 0
        expected, actual = (empty_quantized(37, 352, layout, torch.bfloat16) for _ in range(2))
        expected.steps().zero_()
        actual.steps().zero_()
        REFERENCE.quantize_into(expected, 0, weight)
        native.quantize_into(actual, 0, weight[:9])
        native.quantize_into(actual, 9, weight[9:])
        assert torch.equal(actual.data, expected.data)
