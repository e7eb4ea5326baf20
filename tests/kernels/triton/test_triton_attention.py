"""Paged attention against torch, in the interpreter; its bits must not depend on the batch."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from penstock.kernels.kv_layout import BLOCK_SLOTS, QUANTIZED_DTYPES
from penstock.kernels.reference import attention as torch_attention
from penstock.kernels.triton import decode_attention, kv_layout
from penstock.kernels.triton.attention import StepBounds, paged_attention

BF16, F32 = torch.bfloat16, torch.float32


@dataclass
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = F32
    window: int = 0
    cache_dtype: torch.dtype | None = None  # None: dtype
    slots: int = BLOCK_SLOTS
    sinks: bool = False


class Sequences:
    """Requests with random q, k, v for all of their positions, in a cache whose other slots hold NaN."""

    def __init__(self, shape: Shape, lengths: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        blocks = [-(-length // shape.slots) for length in lengths]
        num_blocks = sum(blocks) + 3
        kept = shape.cache_dtype or shape.dtype
        size = kv_layout.cache_shape(num_blocks, shape.num_kv_heads, shape.head_dim, kept, shape.slots)
        # All bits set: NaN, or of int8 caches -1 with scales that are NaN.
        self.keys, self.values = (
            torch.full((*size[:-1], size[-1] * kept.itemsize), -1, dtype=torch.int8).view(kept) for _ in range(2)
        )
        ids = torch.randperm(num_blocks, generator=generator).int().split([*blocks, 3])
        self.tables = torch.full((len(lengths), max(blocks)), -1, dtype=torch.int32)
        for row, row_ids in enumerate(ids[:-1]):
            self.tables[row, : len(row_ids)] = row_ids
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        self.qkv = [(torch.randn(n, width, generator=generator) * 1.5).to(shape.dtype) for n in lengths]
        self.sinks = torch.randn(shape.num_heads, generator=generator) * 2 if shape.sinks else None

    def write(self, request: int, end: int) -> None:
        """Puts the keys and values of positions [0, end) into the cache."""
        shape = self.shape
        position = torch.arange(end)
        blocks = self.tables[request, position // shape.slots].long()
        offsets = position % shape.slots
        heads = self.qkv[request][:end].view(end, -1, shape.head_dim)
        for index, cache in enumerate((self.keys, self.values)):
            first = shape.num_heads + index * shape.num_kv_heads
            written = heads[:, first : first + shape.num_kv_heads]
            if cache.dtype in QUANTIZED_DTYPES:
                codes, scales = kv_layout.codes_and_scales(cache, shape.head_dim)
                codes[blocks, :, offsets], scales[blocks, :, offsets] = torch_attention._round(written, cache.dtype)
            else:
                cache[blocks, :, offsets] = written

    def attend(self, chunks: list[tuple[int, int, int]], bounds: StepBounds | None = None) -> list[torch.Tensor]:
        """One step over chunks (request, begin, end), whose context was written."""
        shape = self.shape
        qkv = torch.cat([self.qkv[request][begin:end] for request, begin, end in chunks])
        q = qkv[:, : shape.num_heads * shape.head_dim].view(len(qkv), shape.num_heads, shape.head_dim)
        counts = torch.tensor([0] + [end - begin for _, begin, end in chunks], dtype=torch.int32)
        tables = (
            self.tables[[request for request, _, _ in chunks]],
            torch.tensor([end for _, _, end in chunks], dtype=torch.int32),
            counts.cumsum(0).int(),
        )
        scale = shape.head_dim**-0.5
        out = paged_attention(q, (self.keys, self.values), tables, scale, shape.window, self.sinks, bounds)
        return list(out.split(counts[1:].tolist()))

    def expected(self, request: int, begin: int, end: int) -> torch.Tensor:
        """What softmax over all positions at once gives, from the rounded cache."""
        shape = self.shape
        blocks = self.tables[request, : -(-end // shape.slots)].long()
        keys, values = (
            kv_layout.by_slot(cache[blocks], shape.head_dim).flatten(0, 1)[:end].float()
            for cache in (self.keys, self.values)
        )
        group = shape.num_heads // shape.num_kv_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        q = self.qkv[request][begin:end, : shape.num_heads * shape.head_dim].float()
        scores = torch.einsum("qhd,khd->hqk", q.view(-1, shape.num_heads, shape.head_dim), keys) * shape.head_dim**-0.5
        behind = torch.arange(begin, end)[:, None] - torch.arange(end)
        seen = (behind >= 0) & (behind < (shape.window or end))
        scores = scores.masked_fill(~seen, -torch.inf)
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
        weights = scores.softmax(-1)[..., : len(keys)]
        return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    bound = 1e-5 if got.dtype == F32 else 2e-2
    torch.testing.assert_close(got.float(), wanted, rtol=bound, atol=bound)


def check(shape: Shape, chunks: list[tuple[int, int]], seed: int = 0, bounds: StepBounds | None = None) -> None:
    """chunks: each request's (begin, end) of the step."""
    sequences = Sequences(shape, [end for _, end in chunks], seed)
    for request, (_, end) in enumerate(chunks):
        sequences.write(request, end)
    step = [(request, begin, end) for request, (begin, end) in enumerate(chunks)]
    for (request, begin, end), got in zip(step, sequences.attend(step, bounds), strict=True):
        close(got, sequences.expected(request, begin, end))


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        ((2, 2), 64, F32), ((4, 4), 64, BF16), ((8, 1), 80, BF16), ((8, 1), 128, F32), ((8, 1), 128, BF16),
        ((14, 2), 96, BF16), ((2, 1), 18, F32), ((3, 1), 256, BF16), ((20, 1), 32, F32),
    ],
)  # fmt: skip
def test_mixed_batches_of_every_head_shape(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    check(Shape(*heads, head_dim, dtype), [(0, 1), (15, 16), (16, 17), (0, 21), (90, 130), (299, 300)])


@pytest.mark.parametrize("seed", range(10))
def test_random_steps(seed: int) -> None:
    rng = random.Random(seed)
    num_kv_heads = rng.choice([1, 2])
    shape = Shape(
        num_kv_heads * rng.choice([1, 2, 3, 5, 7]), num_kv_heads, rng.choice([16, 48, 64, 100, 128]),
        rng.choice([F32, BF16]), rng.choice([0, 1, 5, 64, 100]), rng.choice([None, None, torch.int8]),
        rng.choice([16, 64, 128]), rng.random() < 0.4,
    )  # fmt: skip
    chunks = [(rng.randrange(end), end) for end in (rng.choice([1, 7, 40, 130, 270]) for _ in range(rng.randint(1, 4)))]
    check(shape, chunks, seed)


@pytest.mark.parametrize("cache_dtype", list(QUANTIZED_DTYPES), ids=str)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_caches_of_8_bits(cache_dtype: torch.dtype, head_dim: int) -> None:
    check(Shape(8, 2, head_dim, BF16, cache_dtype=cache_dtype), [(0, 9), (40, 41), (20, 33)])
    check(Shape(2, 1, head_dim, F32, window=20, cache_dtype=cache_dtype), [(0, 9), (40, 41), (20, 70)])


@pytest.mark.parametrize("window", [1, 16, 63, 64, 65, 600])
def test_windows(window: int) -> None:
    check(Shape(2, 1, 32, window=window), [(599, 600), (60, 200), (0, 1), (255, 256)])


@pytest.mark.parametrize("window", [0, 70])
def test_sinks(window: int) -> None:
    check(Shape(3, 1, 32, window=window, sinks=True), [(0, 1), (280, 281), (30, 100)])


def test_blocks_before_the_window_are_never_looked_at() -> None:
    sequences = Sequences(Shape(4, 2, 32, window=40), [600], 0)
    sequences.write(0, 600)
    steps = [[(0, 599, 600)], [(0, 590, 600)]]
    expected = [sequences.attend(step)[0] for step in steps]
    sequences.keys[sequences.tables[0, :34].long()] = torch.nan
    sequences.values[sequences.tables[0, :34].long()] = torch.nan
    sequences.tables[0, :34] = 2**30
    assert torch.equal(sequences.attend(steps[0])[0], expected[0])
    assert torch.equal(sequences.attend(steps[1])[0], expected[1])
    assert expected[1].isfinite().all()


def test_a_row_without_a_request_is_passed_over() -> None:
    """As in a graph that was captured for more requests: no tokens, no context, a table of nothing."""
    sequences = Sequences(Shape(4, 2, 32), [40, 50], 0)
    for request, end in enumerate((40, 50)):
        sequences.write(request, end)
    expected = sequences.attend([(0, 39, 40), (1, 49, 50)])
    q = torch.stack([sequences.qkv[request][-1, : 4 * 32] for request in (0, 1, 0, 0)]).view(4, 4, 32)
    tables = torch.cat([sequences.tables, torch.full_like(sequences.tables, 2**30)])
    lens = torch.tensor([40, 50, 0, 0], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32)
    for bounds in (StepBounds(64, 1), StepBounds(2000, 4), StepBounds(64, 4, decode_query_len=4)):
        caches = (sequences.keys, sequences.values)
        got = paged_attention(q, caches, (tables, lens, starts), 32**-0.5, bounds=bounds)
        assert torch.equal(got[:2], torch.cat(expected))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("window", [0, 50])
def test_bits_do_not_depend_on_the_batch(dtype: torch.dtype, window: int) -> None:
    chunks = [(299, 300), (0, 40), (520, 521), (3, 90), (0, 1)]
    sequences = Sequences(Shape(4, 1, 32, dtype, window), [end for _, end in chunks], 3)
    for request, (_, end) in enumerate(chunks):
        sequences.write(request, end)
    step = [(request, begin, end) for request, (begin, end) in enumerate(chunks)]
    together = sequences.attend(step)
    reordered = sequences.attend(step[::-1], StepBounds(1500, 90))[::-1]
    for alone, one, other in zip(step, together, reordered, strict=True):
        assert torch.equal(sequences.attend([alone])[0], one)
        assert torch.equal(one, other)


def test_rows_may_be_independent_of_chunks_too() -> None:
    sequences = Sequences(Shape(2, 1, 32), [300, 33], 4)
    for request, end in enumerate((300, 33)):
        sequences.write(request, end)
    bounds = StepBounds(300, 300, row_invariant=True)
    whole = sequences.attend([(0, 290, 300), (1, 30, 33)], bounds)
    close(whole[0], sequences.expected(0, 290, 300))
    parts = [sequences.attend([(0, begin, end)], bounds)[0] for begin, end in ((290, 291), (291, 296), (296, 300))]
    assert torch.equal(torch.cat(parts), whole[0])
    assert torch.equal(sequences.attend([(1, 32, 33)])[0], whole[1][-1:])


def test_several_new_tokens_are_decoded_together() -> None:
    check(Shape(4, 1, 32, window=0), [(296, 300), (50, 53), (0, 2), (70, 71)], bounds=StepBounds(300, 4, 4))
    check(Shape(4, 1, 32, window=30), [(296, 300), (50, 53), (0, 70)], bounds=StepBounds(300, 70, 4))


def test_long_contexts_have_a_bounded_number_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "PIECE_SLOTS", 64)
    monkeypatch.setattr(decode_attention, "MAX_PIECES", 4)
    assert decode_attention.num_pieces_of(10_000, 0) == 4
    check(Shape(2, 1, 32), [(end - 1, end) for end in (64, 65, 256, 257, 512, 700, 1200)])
    check(Shape(2, 1, 32, window=300), [(end - 1, end) for end in (299, 700, 1200)])


@pytest.mark.parametrize("window", [0, 150])
def test_programs_that_take_several_pieces_change_no_bit(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention, "PIECE_SLOTS", 64)
    chunks = [(599, 600), (64, 65), (299, 300), (0, 1), (480, 500)]
    sequences = Sequences(Shape(4, 2, 32, window=window), [end for _, end in chunks], 5)
    for request, (_, end) in enumerate(chunks):
        sequences.write(request, end)
    step = [(request, begin, end) for request, (begin, end) in enumerate(chunks)]
    expected = sequences.attend(step)
    monkeypatch.setattr(decode_attention, "PROGRAMS_A_MULTIPROCESSOR", 0)
    assert all(map(torch.equal, sequences.attend(step), expected))
    close(expected[0], sequences.expected(0, 599, 600))


def test_one_long_context_does_not_start_programs_for_all_the_others() -> None:
    """64 pieces of a long context, 8 key/value heads, 132 multiprocessors."""
    started = {
        requests: 8 * requests * decode_attention.programs_of(64, 8 * requests, 132) for requests in (1, 32, 512)
    }
    assert started[1] == 8 * 64, "alone, it has a program a piece"
    assert started[32] <= 32 * 132
    assert started[512] == 8 * 512


def test_a_huge_score_neither_overflows_nor_hides_the_rest() -> None:
    sequences = Sequences(Shape(2, 1, 16), [300], 0)
    sequences.qkv[0][:, : 3 * 16] *= 100.0
    sequences.write(0, 300)
    for begin in (299, 250):
        got = sequences.attend([(0, begin, 300)])[0]
        torch.testing.assert_close(got, sequences.expected(0, begin, 300), rtol=1e-3, atol=1e-3)


def test_no_tokens() -> None:
    sequences = Sequences(Shape(2, 1, 16), [5], 0)
    empty = torch.zeros(1, dtype=torch.int32)
    q = torch.empty(0, 2, 16)
    caches = (sequences.keys, sequences.values)
    assert paged_attention(q, caches, (sequences.tables[:0], empty[:0], empty), 0.25).shape == (0, 32)
