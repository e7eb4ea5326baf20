"""Every op beside torch and beside the machine's limit, at the shapes of llama3.2-1b and of a tiny model.

The limit of an op is the larger of two times: for moving the bytes that it must move (reading as many over and over;
the weights of large linears come from memory), and for its multiplications (the same instruction on registers alone).
Native, torch and the limits are measured in turns, since a machine is rarely quiet and its memory rarely ours alone:
figures are medians, and the best in brackets. torch is `F.linear`, `F.embedding`, `scaled_dot_product_attention`, for
quantised linears `torch._int_mm` (8 bits, two rows at least), and otherwise the op's reference.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from html import escape
from typing import Any

import torch

from penstock import _native
from penstock.bench.op_cases import BF16, F32, Case, all_cases
from penstock.bench.report_page import STYLE
from penstock.bench.svg_chart import Axis, Series, line_chart
from penstock.kernels import huge_pages, ops
from penstock.kernels.native.dtypes import DTYPE_CODE

MEMORY_BYTES = 1 << 30
MIN_SECONDS = 100e-6  # calls are repeated up to this time, so that reading the clock does not count

Pick = Callable[[list[float]], float]  # median, or minimum


class Limits:
    """The machine's best at moving and multiplying, as things to run beside an op."""

    def __init__(self, isa: str, threads: int) -> None:
        self._kernels = _native.kernels(isa)
        self._threads = threads
        self._buffer = huge_pages.empty(MEMORY_BYTES, torch.uint8).fill_(1)
        self._at = 0

    def read(self, nbytes: int) -> Callable[[], object]:
        """Reads `nbytes` that stay in the cache if they fit, by one thread or all, whichever is faster."""
        nbytes = _bounded(nbytes)
        address = self._buffer.data_ptr()
        candidates = [lambda t=t: self._kernels.read_all(address, nbytes, t) for t in (1, self._threads)]
        repeats = max(3, (8 << 20) // nbytes)
        return min(candidates, key=lambda run: min(seconds_of(run, repeats) for _ in range(3)))

    def read_from_memory(self, nbytes: int) -> Callable[[], object]:
        """Reads `nbytes` that were not read for the last gigabyte."""
        nbytes = _bounded(nbytes)

        def run() -> None:
            self._at = 0 if self._at + nbytes > MEMORY_BYTES else self._at
            self._kernels.read_all(self._buffer.data_ptr() + self._at, nbytes, self._threads)
            self._at += nbytes

        return run

    def multiply(self, dtype: torch.dtype, flops: int) -> Callable[[], object]:
        """About `flops` operations of the linear layers' instruction for `dtype`, at most a millisecond's worth."""
        per_step = self._kernels.multiply_all(DTYPE_CODE[dtype], 1, self._threads)
        steps = max(1, min(30_000, flops // per_step))
        return lambda: self._kernels.multiply_all(DTYPE_CODE[dtype], steps, self._threads)

    def operations(self, dtype: torch.dtype, flops: int) -> int:
        """What `multiply` really does."""
        per_step = self._kernels.multiply_all(DTYPE_CODE[dtype], 1, self._threads)
        return per_step * max(1, min(30_000, flops // per_step))


def _bounded(nbytes: int) -> int:
    return max(4096, min(MEMORY_BYTES // 8, nbytes // 256 * 256))


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def repeats_for(run: Callable[[], object]) -> int:
    run()
    return max(1, int(MIN_SECONDS / max(seconds_of(run, 1), 1e-7)))


def measure(runs: dict[str, Callable[[], object]], budget_s: float) -> dict[str, list[float]]:
    """Seconds of each, in turns, until the time is used up; three of each if they fit into ten times that."""
    repeats = {name: repeats_for(run) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while True:
        for name, run in runs.items():
            samples[name].append(seconds_of(run, repeats[name]))
        spent, rounds = time.perf_counter() - start, len(samples["native"])
        if spent > 10 * budget_s or (spent > budget_s and rounds >= 3):
            return samples


def limit_seconds(case: Case, limits: Limits, samples: dict[str, list[float]], pick: Pick) -> float:
    """The case's limit out of the limits' samples."""
    moving = pick(samples["moving"]) * case.nbytes / _bounded(case.nbytes)
    if case.flops == 0:
        return moving
    return max(moving, pick(samples["multiplying"]) * case.flops / limits.operations(case.dtype, case.flops))


def compare(case: Case, limits: Limits, budget_s: float) -> dict[str, Any]:
    """One line of the table, in seconds."""
    runs = {
        "native": case.native,
        "torch": case.in_torch,
        "moving": (limits.read_from_memory if case.is_from_memory else limits.read)(case.nbytes),
    }
    if case.flops:
        runs["multiplying"] = limits.multiply(case.dtype, case.flops)
    samples = measure(runs, budget_s)
    return {
        "op": case.op,
        "shape": case.shape,
        "native_s": statistics.median(samples["native"]),
        "native_best_s": min(samples["native"]),
        "torch_s": statistics.median(samples["torch"]),
        "torch_best_s": min(samples["torch"]),
        "limit_s": limit_seconds(case, limits, samples, statistics.median),
        "limit_best_s": limit_seconds(case, limits, samples, min),
        "bytes": case.nbytes,
        "flops": case.flops,
    }


def table_row(line: dict[str, Any]) -> str:
    native, best = line["native_s"], line["native_best_s"]
    rate = line["flops"] / native / 1e9
    cells = (
        line["op"],
        line["shape"],
        f"{native * 1e6:,.1f} ({best * 1e6:,.1f})",
        f"{line['torch_s'] * 1e6:,.1f} ({line['torch_best_s'] * 1e6:,.1f})",
        f"{line['torch_s'] / native:.1f}",
        f"{line['bytes'] / native / 1e9:.1f}",
        f"{rate:,.0f}" if line["flops"] else "-",
        f"{line['limit_s'] / native:.2f} ({line['limit_best_s'] / best:.2f})",
    )
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| op | shape | native µs (best) | torch µs (best) | torch / native | GB/s | GFLOP/s | of limit (best) |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def facts_of(native: ops.Ops, limits: Limits) -> dict[str, Any]:
    """The machine's best rates now, and what else a reader needs to place the figures."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    half = MEMORY_BYTES // 8
    memory = half / min(seconds_of(limits.read_from_memory(half), 1) for _ in range(16))
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit.stdout.strip(),
        "isa": native.isa,
        "threads": native.num_threads,
        "load": round(os.getloadavg()[0], 1),
        "memory GB/s": round(memory / 1e9, 1),
    }
    for dtype, name in ((BF16, "bf16"), (F32, "f32"), (torch.int8, "int8")):
        best = min(seconds_of(limits.multiply(dtype, 1 << 40), 1) for _ in range(50))
        facts[f"{name} GFLOP/s"] = round(limits.operations(dtype, 1 << 40) / best / 1e9)
    return facts


def run_ops(
    threads: int, isa: str | None, only: str, budget_s: float, on_line: Callable[[str], None]
) -> dict[str, Any]:
    """Measures every case whose op and shape contain `only`. on_line: is given the table's lines as they come."""
    torch.set_num_threads(threads)
    native, reference = ops.load("native", threads, isa), ops.load("reference", threads)
    limits = Limits(native.isa, threads)
    facts = facts_of(native, limits)
    on_line(f"{_shown(facts)}\n\n{HEADER}")
    lines = []
    with torch.inference_mode():
        for case in all_cases(native, reference):
            if only in f"{case.op} {case.shape}":
                lines.append(compare(case, limits, budget_s))
                on_line(table_row(lines[-1]))
    return {**facts, "ops": lines}


def markdown(found: dict[str, Any]) -> str:
    """The table of what run_ops returned, under its facts."""
    facts = {name: value for name, value in found.items() if name != "ops"}
    rows = "\n".join(table_row(line) for line in found["ops"])
    return f"# Ops\n\n{_shown(facts)}\n\n{HEADER}\n{rows}\n"


def _shown(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in facts.items())


def roofline_page(found: dict[str, Any]) -> str:
    """One page: every op by its arithmetic intensity, under the roofs that the machine's limits are."""
    memory = found["memory GB/s"]
    counted = [line for line in found["ops"] if line["flops"]]
    reach = [10.0 ** (power / 8) for power in range(-8, 33)]
    series = [
        Series(name.removesuffix(" GFLOP/s"), reach, [min(roof, memory * x) for x in reach])
        for name, roof in found.items()
        if name.endswith(" GFLOP/s")
    ]
    for op in dict.fromkeys(line["op"] for line in counted):
        points = [line for line in counted if line["op"] == op]
        series.append(Series(
            op, [line["flops"] / line["bytes"] for line in points],
            [line["flops"] / line["native_s"] / 1e9 for line in points], has_markers=True, has_line=False,
        ))  # fmt: skip
    roofs = line_chart("Roofline", Axis("operations a byte", True), Axis("GFLOP/s", True), series)
    rows = "".join(
        f"<tr><td>{escape(line['op'])}</td><td>{escape(line['shape'])}</td><td>{line['native_s'] * 1e6:,.1f}</td>"
        f"<td>{line['bytes'] / line['native_s'] / 1e9:.1f}</td>"
        f"<td>{line['flops'] / line['native_s'] / 1e9:,.0f}</td><td>{line['limit_s'] / line['native_s']:.2f}</td></tr>"
        for line in found["ops"]
    )
    heads = "".join(f"<th>{name}</th>" for name in ("op", "shape", "µs", "GB/s", "GFLOP/s", "of limit"))
    facts = escape(_shown({name: value for name, value in found.items() if name != "ops"}))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>penstock bench ops</title>'
        f"<style>{STYLE}</style></head><body><h1>Ops against the machine's limits</h1><p>{facts}</p>"
        f'<div class="charts">{roofs}</div><table><tr>{heads}</tr>{rows}</table></body></html>'
    )
