"""Paged attention against torch, per instruction set; its bits must not depend on batch, chunking or threads."""

from __future__ import annotations

import itertools
import random
from dataclasses import astuple, dataclass

import pytest
import torch

from penstock.kernels import ops as op_table
from penstock.kernels.kv_layout import BLOCK_SLOTS, key_cache_shape, keys_by_slot, value_cache_shape, values_by_slot

REFERENCE = op_table.load("reference", 1)
DTYPES = [torch.float32, torch.bfloat16]


@dataclass
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int = 0
    cache_dtype: torch.dtype | None = None  # None: dtype

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


class Sequences:
    """Requests with random q, k, v for all of their positions, in a cache whose other slots hold NaN."""

    def __init__(self, shape: Shape, lengths: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        self.lengths = lengths
        blocks = [-(-length // BLOCK_SLOTS) for length in lengths]
        num_blocks = sum(blocks) + 3
        cache_dtype = shape.cache_dtype or shape.dtype
        arguments = (num_blocks, shape.num_kv_heads, shape.head_dim, cache_dtype)
        # All bits set: NaN, or of int8 caches -1 with scales that are NaN.
        shapes = key_cache_shape(*arguments), value_cache_shape(*arguments)
        self.key_cache, self.value_cache = (
            torch.full((*size[:-1], size[-1] * cache_dtype.itemsize), -1, dtype=torch.int8).view(cache_dtype)
            for size in shapes
        )
        ids = torch.randperm(num_blocks, generator=generator).int().split([*blocks, 3])
        self.tables = torch.full((len(lengths), max(blocks)), -1, dtype=torch.int32)
        for row, row_ids in enumerate(ids[:-1]):
            self.tables[row, : len(row_ids)] = row_ids
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self.qkv = [(torch.randn(n, width, generator=generator) * 1.5).to(shape.dtype) for n in lengths]

    def write(self, request: int, begin: int, end: int) -> None:
        """Puts the keys and values of positions [begin, end) into the cache."""
        position = torch.arange(begin, end)
        slots = self.tables[request, position // BLOCK_SLOTS].long() * BLOCK_SLOTS + position % BLOCK_SLOTS
        ones, zeros = (torch.full((end - begin, self.shape.head_dim // 2), value) for value in (1.0, 0.0))
        qkv = self.qkv[request][begin:end].clone()
        REFERENCE.rope_and_cache(qkv, ones, zeros, self.key_cache, self.value_cache, slots)

    def attend(self, ops: op_table.Ops, chunks: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """One step over chunks (request, begin, end), whose keys and values are written first."""
        for request, begin, end in chunks:
            self.write(request, begin, end)
        shape = self.shape
        qkv = torch.cat([self.qkv[request][begin:end] for request, begin, end in chunks])
        q = qkv[:, : shape.num_heads * shape.head_dim].view(len(qkv), shape.num_heads, shape.head_dim)
        counts = torch.tensor([0] + [end - begin for _, begin, end in chunks], dtype=torch.int32)
        out = ops.paged_attention(
            q,
            self.key_cache,
            self.value_cache,
            self.tables[[request for request, _, _ in chunks]],
            torch.tensor([end for _, _, end in chunks], dtype=torch.int32),
            counts.cumsum(0).int(),
            shape.scale,
            shape.window,
        )
        return list(out.split(counts[1:].tolist()))


def tolerance(dtype: torch.dtype) -> float:
    return 5e-6 if dtype == torch.float32 else 2e-2


def random_shape(rng: random.Random, dtype: torch.dtype) -> Shape:
    num_kv_heads = rng.choice([1, 2, 3])
    group = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 12])
    head_dim = rng.choice([16, 18, 32, 48, 64, 80, 96, 128, 134, 256])
    return Shape(num_kv_heads * group, num_kv_heads, head_dim, dtype, rng.choice([0, 0, 1, 5, 100, 300]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_equals_the_reference(native: op_table.Ops, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    shape = random_shape(rng, dtype)
    lengths = [rng.choice([1, 7, 16, 40, 257, 520]) for _ in range(rng.randint(1, 4))]
    sequences = Sequences(shape, lengths, seed)
    chunks = []
    for request, length in enumerate(lengths):
        begin = rng.randrange(length)
        sequences.write(request, 0, begin) if begin else None
        chunks.append((request, begin, length))
    expected = sequences.attend(REFERENCE, chunks)
    for got, wanted in zip(sequences.attend(native, chunks), expected, strict=True):
        torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_caches_of_8_bits(native: op_table.Ops, dtype: torch.dtype, cache_dtype: torch.dtype, seed: int) -> None:
    """As near to the reference as a cache of `dtype`, near to exact attention, and the same in other batches."""
    rng = random.Random(seed)
    shape = random_shape(rng, dtype)
    shape.cache_dtype = cache_dtype
    lengths = [300, 17, 40]
    chunks = [(0, 290, 300), (1, 0, 17), (2, 39, 40)]
    sequences, exact = Sequences(shape, lengths, seed), Sequences(Shape(*astuple(shape)[:5]), lengths, seed)
    for each in (sequences, exact):
        for request, begin, _ in chunks:
            each.write(request, 0, begin) if begin else None
    got, wanted = sequences.attend(native, chunks), sequences.attend(REFERENCE, chunks)
    unrounded = exact.attend(REFERENCE, chunks)
    for request in range(3):
        bound = max(tolerance(dtype), 2e-5)
        torch.testing.assert_close(got[request].float(), wanted[request].float(), rtol=bound, atol=bound)
        assert (got[request].float() - unrounded[request].float()).abs().mean() < 0.06
    assert torch.equal(sequences.attend(native, chunks[2:])[0], got[2])
    parts = [sequences.attend(native, [(0, begin, begin + 5)])[0] for begin in (290, 295)]
    assert torch.equal(torch.cat(parts), got[0])


def random_cuts(rng: random.Random, length: int) -> list[tuple[int, int]]:
    """[0, length) in consecutive pieces: a few long ones, then some single tokens."""
    cuts = sorted({0, length, *(rng.randrange(length) for _ in range(rng.randint(0, 4)))})
    pieces = list(itertools.pairwise(cuts))
    begin, end = pieces.pop()
    singles = min(end - begin, 3)
    return [*pieces, *([(begin, end - singles)] if end - begin > singles else []),
            *((at, at + 1) for at in range(end - singles, end))]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_bits_do_not_depend_on_chunks_batch_or_threads(native: op_table.Ops, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(100 + seed)
    shape = random_shape(rng, dtype)
    lengths = [rng.choice([3, 33, 260, 530]) for _ in range(3)]
    whole = Sequences(shape, lengths, seed)
    expected = [whole.attend(native, [(request, 0, length)])[0] for request, length in enumerate(lengths)]

    for num_threads in (1, 3):
        ops = op_table.load("native", num_threads, isa=native.isa)
        pieces = Sequences(shape, lengths, seed)
        waiting = {request: random_cuts(rng, length) for request, length in enumerate(lengths)}
        while waiting:
            batch = rng.sample(sorted(waiting), rng.randint(1, len(waiting)))
            chunks = [(request, *waiting[request].pop(0)) for request in batch]
            waiting = {request: cuts for request, cuts in waiting.items() if cuts}
            for (request, begin, end), got in zip(chunks, pieces.attend(ops, chunks), strict=True):
                assert torch.equal(got.view(torch.uint8), expected[request][begin:end].view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_long_decode_is_shared_and_equals_its_prefill(native: op_table.Ops, dtype: torch.dtype) -> None:
    shape = Shape(4, 1, 64, dtype)
    length = 3000
    sequences = Sequences(shape, [length], 0)
    prefill = sequences.attend(native, [(0, 0, length)])[0]
    for num_threads in (1, 2, 5):
        ops = op_table.load("native", num_threads, isa=native.isa)
        assert torch.equal(sequences.attend(ops, [(0, length - 1, length)])[0], prefill[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_before_the_window_are_never_looked_at(native: op_table.Ops, dtype: torch.dtype) -> None:
    shape = Shape(4, 2, 32, dtype, window=40)
    sequences = Sequences(shape, [600], 0)
    sequences.write(0, 0, 599)
    expected = sequences.attend(native, [(0, 599, 600)])[0]
    sequences.key_cache[sequences.tables[0, :35].long()] = torch.nan
    sequences.value_cache[sequences.tables[0, :35].long()] = torch.nan
    sequences.tables[0, :34] = -1
    assert torch.equal(sequences.attend(native, [(0, 599, 600)])[0], expected)
    assert expected.isfinite().all()


def test_a_huge_score_neither_overflows_nor_hides_the_rest(native: op_table.Ops) -> None:
    shape = Shape(2, 1, 16, torch.float32)
    sequences = Sequences(shape, [300], 0)
    sequences.qkv[0][:, : 3 * 16] *= 100.0
    expected = sequences.attend(REFERENCE, [(0, 0, 300)])[0]
    got = sequences.attend(native, [(0, 0, 300)])[0]
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_blocks(native: op_table.Ops, dtype: torch.dtype) -> None:
    caches = [torch.randn(key_cache_shape(6, 2, 32, dtype)).to(dtype), torch.randn(value_cache_shape(6, 2, 32, dtype))]
    copies = [cache.clone() for cache in caches]
    sources, destinations = torch.tensor([1, 1, 4]), torch.tensor([0, 3, 5])
    REFERENCE.copy_blocks(copies, sources, destinations)
    native.copy_blocks(caches, sources, destinations)
    for cache, copy in zip(caches, copies, strict=True):
        assert torch.equal(cache, copy)
        assert torch.equal(cache[3], cache[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_are_inverse_to_their_plain_views(dtype: torch.dtype) -> None:
    sequences = Sequences(Shape(2, 2, 32, dtype), [33], 0)
    sequences.write(0, 0, 33)
    heads = sequences.qkv[0].view(33, 6, 32)
    blocks = sequences.tables[0].long()
    assert torch.equal(keys_by_slot(sequences.key_cache[blocks]).flatten(0, 1)[:33], heads[:, 2:4])
    assert torch.equal(values_by_slot(sequences.value_cache[blocks]).flatten(0, 1)[:33], heads[:, 4:6])
