#!/usr/bin/env python3
"""Every Triton kernel but the matrix products on a GPU, beside the limit that its bytes and operations set.

kernels.py [--only TEXT] [--json FILE] [--tiny]

The limits are measured first, on the same card: a copy's bytes a second, a bfloat16 product's operations a second. A
figure is the median of triton.testing.do_bench, whose cache is cleared between runs. --tiny: small shapes once each
without a clock, which also runs in Triton's interpreter (TRITON_INTERPRET=1) and is how the test suite runs it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from penstock.kernels.triton import activation, attention, full_attention, kv_layout, mla, norm, rope, sampling
from penstock.kernels.triton.rounding import FP8_BLOCKS

SLOTS = 16
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


class Case(NamedTuple):
    """Something to time. nbytes: moved at least. operations: multiplications and additions of the matrix units."""

    name: str
    run: Callable[[], object]
    nbytes: float
    operations: float = 0.0


class Bench:
    """Makes cases on one device; `tiny` divides sizes by 64 or so."""

    def __init__(self, device: str, *, tiny: bool) -> None:
        self.device = device
        self.tiny = tiny

    def random(self, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(dtype)

    def step(self, requests: int, context: int, new: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], int]:
        """(slot mapping, tables, blocks) of a step of `new` tokens a request, blocks in random order."""
        width = -(-context // SLOTS)
        ids = torch.randperm(requests * width, device=self.device).int().view(requests, width)
        lens = torch.full((requests,), context, dtype=torch.int32, device=self.device)
        starts = torch.arange(requests + 1, dtype=torch.int32, device=self.device) * new
        position = torch.arange(context - new, context, device=self.device)
        slots = ids[:, position // SLOTS].long() * SLOTS + position % SLOTS
        return slots.flatten(), (ids, lens, starts), requests * width

    def caches(self, blocks: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        shape = kv_layout.cache_shape(blocks, heads, dim, dtype)
        found = []
        for _ in range(2):
            # Random bits would be NaN now and then: codes are small numbers, scales 1.
            cache = self.random(*shape).to(dtype)
            if dtype == FP8:
                kv_layout.codes_and_scales(cache, dim)[1].fill_(1.0)
            found.append(cache)
        return found[0], found[1]

    def attention(
        self, requests: int, context: int, new: int, dtype: torch.dtype = BF16, heads: tuple[int, int] = (32, 8)
    ) -> Case:
        """`new` tokens a request that see `context` in all, with heads of 128."""
        (num_heads, num_kv_heads), dim = heads, 128
        if self.tiny:
            requests, context, new = min(requests, 2), min(context, 40), min(new, 20)
        _, tables, blocks = self.step(requests, context, new)
        q = self.random(requests * new, num_heads, dim)
        caches = self.caches(blocks, num_kv_heads, dim, dtype)
        bounds = attention.StepBounds(context, new)
        element = 2 * num_kv_heads * (dim * dtype.itemsize + (4 if dtype == FP8 else 0))
        pairs = requests * new * (context - (new - 1) / 2)
        return Case(
            f"{'decode' if new == 1 else 'prefill'} {requests} x {context}, {new} new, {str(dtype)[6:]}",
            partial(attention.paged_attention, q, caches, tables, dim**-0.5, bounds=bounds),
            requests * context * element + 2 * 2 * q.numel(),
            4 * num_heads * dim * pairs,
        )

    def rows(self, tokens: int) -> Iterator[Case]:
        """The kernels of one layer of a Llama of 8 billion parameters that work row by row."""
        if self.tiny:
            tokens = 2
        hidden, wide, heads, kv_heads, dim = 4096, 14336, 32, 8, 128
        x, residual, weight = self.random(tokens, hidden), self.random(tokens, hidden), self.random(hidden)
        size = 2.0 * tokens * hidden
        yield Case(f"add_rms_norm {tokens}", partial(norm.rms_norm, x, residual, weight, 1e-5), 4 * size)
        quantized = partial(norm.rms_norm_quantize, x, residual, weight, 1e-5, FP8_BLOCKS)
        yield Case(f"add_rms_norm to fp8 {tokens}", quantized, 3.5 * size)
        gate_up = self.random(tokens, 2 * wide)
        yield Case(f"silu_and_mul {tokens}", partial(activation.silu_and_mul, gate_up), 6.0 * tokens * wide)
        gated = partial(activation.silu_and_mul_quantize, gate_up, FP8_BLOCKS)
        yield Case(f"silu_and_mul to fp8 {tokens}", gated, 5.0 * tokens * wide)
        slots, _, blocks = self.step(tokens, SLOTS, 1)
        caches = self.caches(blocks, kv_heads, dim, BF16)
        qkv = self.random(tokens, (heads + 2 * kv_heads) * dim)
        rotary = [self.random(tokens, dim // 2, dtype=torch.float32) for _ in range(2)]
        run = partial(rope.rope_and_cache, qkv, rotary[0], rotary[1], *caches, slots)
        yield Case(f"rope_and_cache {tokens}", run, 4.0 * qkv.numel() + 4.0 * tokens * dim)

    def samplers(self, rows: int) -> Iterator[Case]:
        """Bytes of one reading of the logits, though filters need more: what they cost shows as a share of it."""
        rows, vocab = (1, 500) if self.tiny else (rows, 128256)
        logits = self.random(rows, vocab, dtype=torch.float32) * 2

        def settings(temperature: float, top_k: int, top_p: float) -> tuple[torch.Tensor, ...]:
            values = ((temperature, torch.float32), (top_k, torch.int32), (top_p, torch.float32), (0.0, torch.float32))
            filled = [torch.full((rows,), value, dtype=dtype, device=self.device) for value, dtype in values]
            return (*filled, torch.rand(rows, dtype=torch.float64, device=self.device))

        for name, values in (
            ("greedy", (0.0, 0, 1.0)), ("temperature", (1.0, 0, 1.0)), ("top-k 50", (1.0, 50, 1.0)),
            ("top-p 0.9", (0.7, 0, 0.9)), ("top-k 50, top-p 0.9", (0.7, 50, 0.9)),
        ):  # fmt: skip
            run = partial(sampling.sample, logits, *settings(*values))
            yield Case(f"sample {rows}, {name}", run, 4.0 * logits.numel())
        ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
        yield Case(f"top_logprobs {rows}, 5", partial(sampling.top_logprobs, logits, ids, 5), 4.0 * logits.numel())

    def latent(self, requests: int, context: int, num_heads: int) -> Case:
        """MLA decode."""
        if self.tiny:
            requests, context = 1, 20
        _, (ids, lens, starts), blocks = self.step(requests, context, 1)
        cache = self.random(blocks, SLOTS, mla.LATENT_DIM + mla.ROPE_DIM)
        q = self.random(requests, num_heads, mla.LATENT_DIM + mla.ROPE_DIM)
        return Case(
            f"mla_decode {requests} x {context}, {num_heads} heads",
            partial(mla.mla_decode, q, cache, (ids, lens, starts), 0.04, context),
            2.0 * requests * context * q.shape[2] + 2.0 * q.numel() * 2,
            2.0 * requests * context * num_heads * (q.shape[2] + mla.LATENT_DIM),
        )

    def encoder(self, texts: int, length: int) -> Case:
        """An encoder's attention: 12 heads of 64."""
        if self.tiny:
            texts, length = 2, 20
        qkv = self.random(texts * length, 3 * 12 * 64)
        starts = torch.arange(texts + 1, dtype=torch.int32, device=self.device) * length
        run = partial(full_attention.full_attention, qkv, starts, 12, 0.125)
        operations = 4.0 * 12 * 64 * texts * length * length
        return Case(f"full_attention {texts} x {length}", run, 2.0 * qkv.numel() * 4 / 3, operations)

    def cases(self) -> Iterator[Case]:
        for requests in (1, 8, 32, 128, 256):
            yield self.attention(requests, 1024, 1)
        yield self.attention(1, 32768, 1)
        yield self.attention(32, 8192, 1)
        yield self.attention(32, 8192, 1, FP8)
        yield self.attention(1, 4096, 4096)
        yield self.attention(1, 16384, 4096)
        yield self.attention(8, 1024, 1024)
        yield self.attention(1, 4096, 4096, FP8)
        for tokens in (32, 8192):
            yield from self.rows(tokens)
        for rows in (1, 32, 256):
            yield from self.samplers(rows)
        yield self.latent(32, 4096, 16)
        yield self.latent(32, 4096, 128)
        yield self.encoder(64, 512)


def limits() -> tuple[float, float]:
    """(bytes a second of a copy, read and written; operations a second of a bfloat16 product), as torch does them."""
    import triton

    source = torch.empty(2**31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    product_ms = triton.testing.do_bench(lambda: a @ b, return_mode="median")
    return 2 * source.nbytes / copy_ms * 1e3, 2 * 8192**3 / product_ms * 1e3


def time_all(bench: Bench, only: str) -> dict[str, object]:
    """Times each case and prints it; what is written as JSON."""
    import triton

    bandwidth, rate = limits()
    print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s")
    figures = []
    for case in bench.cases():
        if only not in case.name:
            continue
        case.run()
        seconds = triton.testing.do_bench(case.run, return_mode="median") / 1e3
        floor = max(case.nbytes / bandwidth, case.operations / rate)
        print(f"{case.name:45} {seconds * 1e6:10.1f} us  {floor / seconds:6.2f} of the limit", flush=True)
        figures.append({"case": case.name, "seconds": seconds, "floor": floor, "share": floor / seconds})
    card = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    return {**card, "bandwidth": bandwidth, "rate": rate, "cases": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        for case in Bench("cuda" if torch.cuda.is_available() else "cpu", tiny=True).cases():
            if options.only in case.name:
                case.run()
                print(case.name)
        return
    found = time_all(Bench("cuda", tiny=False), options.only)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
