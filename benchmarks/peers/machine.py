"""The machine's limits beside each figure of quantized.py: DRAM's read bandwidth, the rates of 8- and 16-bit products.

A shared machine's memory changes its speed by half within minutes: a bound holds for the moment it was measured in.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

READ_BYTES = 1 << 29


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


class LimitsMeter:
    """Holds what the measurements need, so that one takes a third of a second."""

    def __init__(self, threads: int) -> None:
        import torch

        from penstock import _native
        from penstock.kernels import huge_pages, ops

        torch.set_num_threads(threads)
        isa = ops.load("native", threads).isa
        assert isa is not None
        self._threads = threads
        self._kernels = _native.kernels(isa)
        self._buffer = huge_pages.empty(READ_BYTES, torch.uint8).fill_(1)
        self._a = torch.randint(-127, 127, (512, 2048), dtype=torch.int8)
        self._b = torch.randint(-127, 127, (8192, 2048), dtype=torch.int8).t()

    def measure(self) -> Limits:
        """Medians of a few runs each."""
        import torch

        address = self._buffer.data_ptr()
        return Limits(
            READ_BYTES / _median_s(lambda: self._kernels.read_all(address, READ_BYTES, self._threads)) / 1e9,
            2 * 512 * 2048 * 8192 / _median_s(lambda: torch._int_mm(self._a, self._b)) / 1e9,
            self._registers_gops(torch.int8),
            self._registers_gops(torch.bfloat16),
        )

    def _registers_gops(self, dtype: torch.dtype, steps: int = 150_000) -> float:
        from penstock.kernels.native.dtypes import DTYPE_CODE

        def run(steps: int) -> int:
            return self._kernels.multiply_all(DTYPE_CODE[dtype], steps, self._threads)

        return run(1) * steps / _median_s(lambda: run(steps)) / 1e9


def _median_s(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
