"""Quantised linears on the GPU's layouts, in the interpreter: against the reference's values and float64 products."""

from __future__ import annotations

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf import quants

from penstock.kernels import ops
from penstock.kernels.quantized import (
    GGUF_LAYOUTS,
    INT4,
    INT8_CHANNEL,
    NF4,
    Q8_0,
    W8A8,
    W8A16,
    WeightLayout,
    empty_quantized,
    fp8,
    w4a16,
    with_int8_activations,
)
from penstock.kernels.reference.gguf_blocks import BLOCKS
from penstock.kernels.reference.quantized import values_of
from penstock.kernels.triton import activation, configs, linear, packing, weights

REFERENCE = ops.load("reference", 1)
Q4_1 = GGUF_LAYOUTS[3]
HALVES = {2: [0], 3: [0, 2], 6: [0], 7: [0, 2], 8: [0], 20: [0], 10: [80, 82], 11: [108], 12: [0, 2], 13: [0, 2],
          14: [208], 23: [0], 39: []}  # fmt: skip
CODE_LAYOUTS = [
    w4a16(128), w4a16(64, "bf16", "point"), w4a16(256, "f32", "point"), w4a16(32), W8A16, NF4, fp8("e5m2", 128, "bf16"),
    WeightLayout(4, 64, "int8", "f32", "point"), WeightLayout(8, 128, "float", "f16", "point"), fp8("e4m3", 64),
    with_int8_activations(w4a16(128)), with_int8_activations(WeightLayout(8, 256, "float", "f32", offset=128)),
]  # fmt: skip


def random_blocks(ggml_type: int, rows: int, k: int) -> torch.Tensor:
    """Rows of blocks of random bits, whose 16-bit floats are finite and of a usual size."""
    inputs, block_bytes, _ = BLOCKS[ggml_type]
    random = np.random.default_rng(rows + k)
    blocks = random.integers(0, 256, (rows * k // inputs, block_bytes), dtype=np.uint8)
    for at in HALVES[ggml_type]:
        scales = random.standard_normal(len(blocks)).astype(np.float16) * np.float16(0.01)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if ggml_type == gguf.GGMLQuantizationType.MXFP4:
        blocks[:, 0] = blocks[:, 0] % 20 + 110
    return torch.from_numpy(blocks.reshape(rows, -1))


def random_parts(layout: WeightLayout, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales, and minimums or points."""
    groups = -(-k // layout.group_size) if layout.group_size else 1
    codes = torch.randint(0, 1 << layout.bits, (n, k), dtype=torch.uint8)
    codes[~values_of(layout, torch.float32)[codes.long()].isfinite()] = 1
    scales = torch.randn(n, groups) * 0.01
    if layout.scales != "f32":
        scales = scales.to(torch.float16 if layout.scales == "f16" else torch.bfloat16).float()
    minimums = {"none": None, "own": (torch.randn(n, groups) * 0.05).half().float()}
    return codes, scales, minimums.get(layout.minimums, torch.randint(0, 1 << layout.bits, (n, groups)).float())


def packed_twice(
    layout: WeightLayout, n: int, k: int, capability: int = 90
) -> tuple[weights.DeviceQuantized, torch.Tensor]:
    """A random weight in the GPU's layout, filled in two pieces, and its values by the reference."""
    device = weights.empty_quantized(n, k, layout, torch.bfloat16, "cpu", capability)
    host = empty_quantized(n, k, layout, torch.bfloat16)
    ggml_type = next((number for number, other in GGUF_LAYOUTS.items() if other == layout), None)
    cut = n // 3
    if ggml_type is not None and k % BLOCKS[ggml_type][0] == 0:
        blocks = random_blocks(ggml_type, n, k)
        REFERENCE.pack_gguf(host, 0, blocks, ggml_type)
        packing.pack_gguf(device, 0, blocks[:cut], ggml_type)
        packing.pack_gguf(device, cut, blocks[cut:], ggml_type)
    else:
        codes, scales, points = random_parts(layout, n, k)
        REFERENCE.pack_parts(host, 0, codes, scales, points)
        for rows in (slice(0, cut), slice(cut, n)):
            packing.pack_parts(device, rows.start, codes[rows], scales[rows], None if points is None else points[rows])
    return device, REFERENCE.dequantize(host)


def assert_product(actual: torch.Tensor, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Against float64: sums of products in float32, rounded once."""
    exact = x.double() @ values.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ values.double().abs().T + exact.abs()
    rounding = 2**-8 if actual.dtype == torch.bfloat16 else 0
    assert ((actual.double() - exact).abs() <= size * 1e-5 + exact.abs() * rounding + 1e-6).all()


class TestLayouts:
    @pytest.mark.parametrize("layout", [*CODE_LAYOUTS, *GGUF_LAYOUTS.values()], ids=str)
    def test_rows_are_the_references(self, layout: WeightLayout) -> None:
        device, values = packed_twice(layout, 21, 512)
        assert torch.equal(linear.dequantize(device, 3, 7), values[3:10])
        ids = torch.tensor([20, 0, 20, 4])
        assert torch.equal(linear.embedding(ids, device), values[ids].bfloat16())
        assert linear.embedding(ids[:0], device).shape == (0, 512)
        assert device.nbytes == weights.quantized_nbytes(21, 512, layout)

    @pytest.mark.parametrize("layout", [fp8(), fp8("e4m3", 128, "bf16"), W8A8, INT8_CHANNEL], ids=str)
    def test_rows_of_dense_codes(self, layout: WeightLayout) -> None:
        device, values = packed_twice(layout, 21, 352)
        assert device.kind in ("fp8", "int8")
        assert torch.equal(linear.dequantize(device), values)
        assert torch.equal(linear.embedding(torch.tensor([5, 1]), device), values[[5, 1]].bfloat16())

    @pytest.mark.parametrize("layout", [w4a16(128), GGUF_LAYOUTS[12], GGUF_LAYOUTS[14], fp8(), W8A8], ids=str)
    def test_bytes_alone_carry_a_weight(self, layout: WeightLayout) -> None:
        device, values = packed_twice(layout, 9, 256)
        again = weights.from_bytes(device.data.clone(), 9, 256, layout, torch.bfloat16, device.kind)
        assert torch.equal(linear.dequantize(again), values)

    @pytest.mark.parametrize("layout", [INT4, GGUF_LAYOUTS[Q8_0], INT8_CHANNEL], ids=str)
    def test_rounding_is_the_references(self, layout: WeightLayout) -> None:
        source = torch.randn(20, 330)
        device = weights.empty_quantized(20, 330, layout, torch.bfloat16, "cpu")
        host = empty_quantized(20, 330, layout, torch.bfloat16)
        packing.quantize_into(device, 0, source)
        REFERENCE.quantize_into(host, 0, source)
        assert torch.equal(linear.dequantize(device), REFERENCE.dequantize(host))

    def test_blocks_mean_what_the_gguf_package_says(self) -> None:
        blocks = random_blocks(12, 5, 512)
        device = weights.empty_quantized(5, 512, GGUF_LAYOUTS[12], torch.bfloat16, "cpu")
        packing.pack_gguf(device, 0, blocks, 12)
        expected = quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_K)
        assert np.array_equal(linear.dequantize(device).numpy(), expected)


class TestCodes:
    @pytest.mark.parametrize("layout", [*CODE_LAYOUTS, *GGUF_LAYOUTS.values()], ids=str)
    def test_products(self, layout: WeightLayout) -> None:
        device, values = packed_twice(layout, 70, 512)
        x = torch.randn(5, 512, dtype=torch.bfloat16)
        assert_product(linear.linear(x, device, None, torch.float32), x, values, None)

    @pytest.mark.parametrize("shape", [(1, 1, 8), (17, 130, 352), (70, 33, 1000), (3, 200, 96)], ids=str)
    @pytest.mark.parametrize("layout", [w4a16(128), w4a16(64, "f16", "point"), W8A16, Q4_1], ids=str)
    def test_ragged(self, shape: tuple[int, int, int], layout: WeightLayout) -> None:
        m, n, k = shape
        device, values = packed_twice(layout, n, k)
        x, bias = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n, dtype=torch.bfloat16)
        assert_product(linear.linear(x, device, bias), x, values, bias)

    def test_no_tokens(self) -> None:
        device, _ = packed_twice(w4a16(128), 40, 256)
        assert linear.linear(torch.empty(0, 256, dtype=torch.bfloat16), device).shape == (0, 40)

    def test_float32_activations(self) -> None:
        device, values = packed_twice(w4a16(32), 40, 96)
        x = torch.randn(3, 96)
        assert_product(linear.linear(x, device), x, values, None)

    def test_e4m3_on_an_older_card(self) -> None:
        device, values = packed_twice(fp8(), 40, 256, capability=80)
        x = torch.randn(3, 256, dtype=torch.bfloat16)
        assert device.kind == "codes"
        assert_product(linear.linear(x, device), x, values, None)


class TestDense:
    @pytest.mark.parametrize("shape", [(1, 1, 8), (17, 130, 352), (70, 33, 1000), (3, 100, 2048)], ids=str)
    @pytest.mark.parametrize("layout", [fp8(), fp8("e4m3", 128, "bf16"), W8A8, INT8_CHANNEL], ids=str)
    def test_products_of_rounded_activations(self, shape: tuple[int, int, int], layout: WeightLayout) -> None:
        m, n, k = shape
        device, values = packed_twice(layout, n, k)
        x, bias = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n, dtype=torch.bfloat16)
        form = linear.form_of(device)
        assert form == ((torch.float8_e4m3fn, 128) if device.kind == "fp8" else (torch.int8, layout.x_block))
        codes, scales = activation.quantize(x, form)
        rounded = codes.float() * scales.repeat_interleave(form.block or codes.shape[1], 1)[:, : codes.shape[1]]
        assert not codes[:, k:].float().any()
        error = (rounded[:, :k] - x.float()).abs()
        assert (error <= x.float().abs() / 16 + scales.amax()).all()
        product = linear.linear(x, device, bias)
        assert_product(product, rounded[:, :k].double(), values, bias)
        made_before = linear.RoundedActivations(codes, scales)
        assert torch.equal(linear.rounded_linear(made_before, device, bias), product)

    def test_what_is_not_finite_stays_with_its_row(self) -> None:
        device, _ = packed_twice(fp8(), 40, 256)
        x = torch.randn(3, 256, dtype=torch.bfloat16)
        x[1, 7] = torch.inf
        out = linear.linear(x, device)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()

    @pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
    @pytest.mark.parametrize("row_invariant", [False, True], ids=str)
    def test_floats(self, out_dtype: torch.dtype | None, row_invariant: bool) -> None:
        weight = weights.empty_linear(130, 200, torch.bfloat16, "cpu")
        values = torch.randn(130, 200).bfloat16()
        packing.pack_into(weight, 0, values[:50].float())
        packing.pack_into(weight, 50, values[50:])
        assert weight.nbytes == weights.linear_nbytes(130, 200, torch.bfloat16)
        x, bias = torch.randn(9, 200, dtype=torch.bfloat16), torch.randn(130, dtype=torch.bfloat16)
        assert_product(linear.linear(x, weight, bias, out_dtype, row_invariant=row_invariant), x, values.double(), bias)
        assert torch.equal(linear.embedding(torch.tensor([3, 3, 129]), weight), values[[3, 3, 129]])


def narrow(card: configs.Card) -> configs.Card:
    """The same card with tiles for 16 tokens and for 32."""
    tiles = {
        family: [configs.Tile(16, 16, 64, 4, 2), configs.Tile(1 << 30, 32, 128, 4, 2)] for family in configs.FAMILIES
    }
    return configs.Card(card.card, False, card.capability, card.multiprocessors, tiles, {})


@pytest.mark.parametrize("multiprocessors", [132, 1], ids=["split among programs", "walked by one"])
@pytest.mark.parametrize("layout", [w4a16(128), GGUF_LAYOUTS[12], fp8(), W8A8, None], ids=str)
def test_a_rows_bits_do_not_depend_on_the_others(
    layout: WeightLayout | None, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token by a tile of 16 and ranges among programs; twenty by tiles of 32, on a small card by one program."""
    n, k = 70, 512  # four steps in three ranges: the last is empty
    if layout is None:
        weight = weights.empty_linear(n, k, torch.bfloat16, "cpu")
        packing.pack_into(weight, 0, torch.randn(n, k))
    else:
        weight, _ = packed_twice(layout, n, k)
    card = narrow(configs.of_device(torch.device("cpu")))
    splits = {family: {f"{n}x{k}": 3} for family in configs.FAMILIES}
    x = torch.randn(20, k, dtype=torch.bfloat16)

    def run(rows: torch.Tensor, processors: int) -> torch.Tensor:
        chosen = configs.Card(card.card, False, 90, processors, card.tiles, splits)
        monkeypatch.setattr(configs, "of_device", lambda _device: chosen)
        return linear.linear(rows, weight, None, torch.float32, row_invariant=True)  # type: ignore[arg-type]

    together = run(x, multiprocessors)
    for row in (0, 19):
        assert torch.equal(run(x[row : row + 1], 132), together[row : row + 1])


@pytest.mark.parametrize("layout", [fp8(), W8A8, None], ids=str)
def test_tensor_copies_change_no_bit(layout: WeightLayout | None, monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, k = 70, 130, 384
    weight: weights.DeviceLinear | weights.DeviceQuantized
    if layout is None:
        weight = weights.empty_linear(n, k, torch.bfloat16, "cpu")
        packing.pack_into(weight, 0, torch.randn(n, k))
    else:
        weight, _ = packed_twice(layout, n, k)
    x, bias = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n, dtype=torch.bfloat16)
    by_threads = linear.linear(x, weight, bias, row_invariant=True)
    card = msgspec.structs.replace(configs.of_device(torch.device("cpu")), tensor_copies=True)
    monkeypatch.setattr(configs, "of_device", lambda _device: card)
    assert torch.equal(linear.linear(x, weight, bias, row_invariant=True), by_threads)
