"""The machine's limits in the rounds of quantized.py: DRAM's read bandwidth and the rates of 8- and 16-bit products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

READ_BYTES = 1 << 30


@dataclass(frozen=True)
class Limits:
    """read_gb_s: sums over memory in huge pages. int_mm_gops: torch._int_mm, 512x2048 by 2048x8192. peak_gops and
    bf16_gops: dot products of 8 bits and of bfloat16 on registers alone."""

    read_gb_s: float
    int_mm_gops: float
    peak_gops: float
    bf16_gops: float

    @staticmethod
    def median(measured: Sequence[Limits]) -> Limits:
        return Limits(*(statistics.median(values) for values in zip(*map(astuple, measured), strict=True)))


def measure_limits(threads: int) -> Limits:
    """Medians of a few runs each; about a second."""
    import torch

    from penstock import _native
    from penstock.kernels import huge_pages, ops
    from penstock.kernels.native.dtypes import DTYPE_CODE

    torch.set_num_threads(threads)
    isa = ops.load("native", threads).isa
    assert isa is not None
    kernels = _native.kernels(isa)
    buffer = huge_pages.empty(READ_BYTES, torch.uint8).fill_(1)
    a = torch.randint(-127, 127, (512, 2048), dtype=torch.int8)
    b = torch.randint(-127, 127, (8192, 2048), dtype=torch.int8).t()

    def registers_gops(dtype: torch.dtype, steps: int = 300_000) -> float:
        operations = kernels.multiply_all(DTYPE_CODE[dtype], 1, threads) * steps
        return operations / _median_s(lambda: kernels.multiply_all(DTYPE_CODE[dtype], steps, threads)) / 1e9

    return Limits(
        READ_BYTES / _median_s(lambda: kernels.read_all(buffer.data_ptr(), READ_BYTES, threads)) / 1e9,
        2 * 512 * 2048 * 8192 / _median_s(lambda: torch._int_mm(a, b)) / 1e9,
        registers_gops(torch.int8),
        registers_gops(torch.bfloat16),
    )


def _median_s(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
