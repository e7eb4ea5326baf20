"""Linear layers, packing and embedding: every instruction set that works here against the torch reference."""

from __future__ import annotations

import random

import pytest
import torch

from penstock import _native
from penstock.kernels import ops
from penstock.kernels.huge_pages import Arena
from penstock.kernels.native.dtypes import DTYPE_CODE
from penstock.kernels.packed import PackedLinear, empty_packed
from penstock.kernels.reference.linear import unpack

DTYPES = [torch.bfloat16, torch.float32]
REFERENCE = ops.load("reference", 1)

# (T, N, K): around the edges of strips, tiles, panels, row blocks and blocks of k; odd ones; one output; one input.
EDGES = [
    (1, 1, 1), (1, 16, 2), (2, 17, 3), (6, 64, 32), (7, 63, 65), (13, 130, 127), (37, 48, 129), (1, 320, 1024),
    (25, 80, 2050), (3, 96, 4099), (24, 33, 6145), (515, 20, 40), (1030, 70, 9), (600, 130, 2100),
]  # fmt: skip


def random_shapes(count: int) -> list[tuple[int, int, int]]:
    rng = random.Random(7)
    return [(rng.randint(1, 70), rng.randint(1, 200), rng.randint(1, 600)) for _ in range(count)]


def assert_linear_close(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Sums of k products in float32 differ by the order of adding only; a bfloat16 result by its last bit besides."""
    exact = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact = exact + bias.double()
    tolerance = scale * 2e-6 + 1e-6
    if actual.dtype == torch.bfloat16:
        tolerance = tolerance + exact.abs() * 2**-8
    assert ((actual.double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestLinear:
    @pytest.mark.usefixtures("tuned")
    @pytest.mark.parametrize("shape", [*EDGES, *random_shapes(12)], ids=str)
    def test_parity(self, native: ops.Ops, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
        tokens, n, k = shape
        x, weight, bias = torch.randn(tokens, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
        packed = ops.pack_linear(native, [weight], dtype)
        assert_linear_close(native.linear(x, packed), x, weight, None)
        assert_linear_close(native.linear(x, packed, bias), x, weight, bias)
        with_bias = native.linear(x, packed, bias, torch.float32)
        assert with_bias.dtype == torch.float32
        assert_linear_close(with_bias, x, weight, bias)
        assert_linear_close(REFERENCE.linear(x, packed, bias, torch.float32), x, weight, bias)

    @pytest.mark.usefixtures("tuned")
    @pytest.mark.parametrize("k", [64, 1000, 2049, 6000])
    def test_a_row_is_the_same_in_any_batch(self, native: ops.Ops, dtype: torch.dtype, k: int) -> None:
        n = 200
        packed = ops.pack_linear(native, [torch.randn(n, k)], dtype)
        bias = torch.randn(n).to(dtype)
        x = torch.randn(531, k).to(dtype)
        alone = torch.cat([native.linear(x[i : i + 1], packed, bias) for i in range(40)])
        for tokens in (2, 3, 5, 6, 7, 8, 11, 12, 13, 17, 32, 37, 40):
            assert torch.equal(native.linear(x[:tokens], packed, bias), alone[:tokens])
        assert torch.equal(native.linear(x, packed, bias)[:40], alone)
        assert torch.equal(native.linear(x[500:], packed, bias), native.linear(x, packed, bias)[500:])

    @pytest.mark.usefixtures("tuning_restored")
    def test_tuning_changes_no_bit(self, native: ops.Ops, dtype: torch.dtype) -> None:
        packed = ops.pack_linear(native, [torch.randn(200, 2050)], dtype)
        x = torch.randn(40, 2050).to(dtype)
        _native.tune(True)
        expected = {rows: native.linear(x[:rows], packed) for rows in (1, 7, 16, 40)}
        assert _native.tune(False) is True
        for rows, rows_expected in expected.items():
            assert torch.equal(native.linear(x[:rows], packed), rows_expected)

    def test_one_thread_gives_the_same(self, native: ops.Ops, dtype: torch.dtype) -> None:
        single = ops.load("native", 1, native.isa)
        packed = ops.pack_linear(native, [torch.randn(700, 900)], dtype)
        x = torch.randn(19, 900).to(dtype)
        assert torch.equal(native.linear(x, packed), single.linear(x, packed))

    def test_nothing_beyond_the_weight_is_multiplied(self, native: ops.Ops, dtype: torch.dtype) -> None:
        """Padding is zero, and NaN in one column stays in that column."""
        weight = torch.randn(21, 7)
        weight[20] = torch.nan
        out = native.linear(torch.randn(5, 7).to(dtype), ops.pack_linear(native, [weight], dtype))
        assert torch.isfinite(out[:, :20]).all()
        assert torch.isnan(out[:, 20]).all()

    def test_no_rows(self, native: ops.Ops, dtype: torch.dtype) -> None:
        packed = ops.pack_linear(native, [torch.randn(8, 8)], dtype)
        assert native.linear(torch.empty(0, 8, dtype=dtype), packed).shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestPacking:
    @pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("shape", [(16, 32), (1, 1), (33, 31), (100, 67), (320, 130)], ids=str)
    def test_parity(
        self, native: ops.Ops, dtype: torch.dtype, source_dtype: torch.dtype, shape: tuple[int, int]
    ) -> None:
        weight = torch.randn(shape).to(source_dtype)
        packed = ops.pack_linear(native, [weight], dtype)
        assert torch.equal(packed.data, ops.pack_linear(REFERENCE, [weight], dtype).data)
        assert torch.equal(unpack(packed), weight.to(dtype))

    def test_shards_that_share_a_tile(self, native: ops.Ops, dtype: torch.dtype) -> None:
        shards = [torch.randn(rows, 45) for rows in (5, 40, 16, 3, 1, 30)]
        packed = ops.pack_linear(native, shards, dtype)
        assert torch.equal(unpack(packed), torch.cat(shards).to(dtype))
        assert not packed.tiles()[-1, :, packed.n % 16 :].any()

    def test_rows_are_written_where_asked(self, native: ops.Ops, dtype: torch.dtype) -> None:
        packed = empty_packed(50, 24, dtype)
        packed.data.zero_()
        rows = torch.randn(20, 24)
        native.pack_into(packed, 9, rows)
        expected = torch.zeros(50, 24)
        expected[9:29] = rows
        assert torch.equal(unpack(packed), expected.to(dtype))

    @pytest.mark.parametrize("shape", [(40, 32), (70, 33), (16, 1)], ids=str)
    def test_embedding(self, native: ops.Ops, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        table = torch.randn(shape).to(dtype)
        packed = ops.pack_linear(native, [table], dtype)
        ids = torch.randint(0, shape[0], (203,))
        assert torch.equal(native.embedding(ids, packed), table[ids])
        assert torch.equal(REFERENCE.embedding(ids, packed), table[ids])


class TestTilesEmulated:
    """The loop of the AMX kernel, over tiles that are emulated: the machines that test this have no AMX."""

    SHAPES = [(1, 16, 32), (5, 33, 20), (16, 64, 64), (17, 70, 90), (32, 130, 1000), (33, 48, 34), (50, 300, 2300)]

    @staticmethod
    def linear(
        x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        out = torch.empty(x.shape[0], packed.n, dtype=out_dtype)
        _native.kernels("portable").linear_emulated_tiles(
            x.data_ptr(), packed.data.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(),
            x.shape[0], packed.n, packed.k, DTYPE_CODE[out_dtype], 2,
        )  # fmt: skip
        return out

    @pytest.mark.parametrize("shape", [*SHAPES, (3, 17, 7), (600, 20, 33), (515, 90, 4200)], ids=str)
    @pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
    def test_parity(self, shape: tuple[int, int, int], out_dtype: torch.dtype) -> None:
        tokens, n, k = shape
        x, weight, bias = (torch.randn(size).bfloat16() for size in ((tokens, k), (n, k), (n,)))
        packed = ops.pack_linear(REFERENCE, [weight], torch.bfloat16)
        assert_linear_close(self.linear(x, packed, bias, out_dtype), x, weight, bias)

    def test_a_row_is_the_same_in_any_batch(self) -> None:
        packed = ops.pack_linear(REFERENCE, [torch.randn(100, 1111)], torch.bfloat16)
        x = torch.randn(70, 1111).bfloat16()
        alone = torch.cat([self.linear(x[i : i + 1], packed, None, torch.float32) for i in range(70)])
        for tokens in (2, 15, 16, 17, 31, 32, 33, 48, 70):
            assert torch.equal(self.linear(x[:tokens], packed, None, torch.float32), alone[:tokens])


def test_special_values_survive_conversion(native: ops.Ops) -> None:
    """Infinities, NaN, float16 subnormals, and rounding to even in bfloat16."""
    half = torch.tensor([[torch.inf, -torch.inf, torch.nan, 6e-8, -3e-5, 65504.0, 0.0, -0.0]], dtype=torch.float16)
    single = torch.tensor([[1.00390625, 1.01171875, 3.3e38, -3.4e38, torch.inf, torch.nan, 0.0, 1e-30]])
    for source in (half, single):
        for dtype in DTYPES:
            unpacked = unpack(ops.pack_linear(native, [source], dtype))
            assert torch.equal(torch.nan_to_num(unpacked, nan=7.0), torch.nan_to_num(source.to(dtype), nan=7.0))


def test_an_arena_gives_each_tensor_its_own_bytes():
    arena = Arena()
    sizes = [1, 63, 64, 65, 3 << 20, 1000, 30 << 20, (16 << 20) - 1, 15 << 20, 15 << 20, 15 << 20, 15 << 20, 7]
    tensors = [arena.empty(size, torch.uint8).fill_(index) for index, size in enumerate(sizes)]
    for index, (size, tensor) in enumerate(zip(sizes, tensors, strict=True)):
        assert tensor.shape == (size,)
        assert tensor.data_ptr() % 64 == 0
        assert (tensor == index).all()
    assert arena.empty(5, torch.float32).shape == (5,)
