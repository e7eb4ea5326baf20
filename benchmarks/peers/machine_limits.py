#!/usr/bin/env python3
"""What this machine can do at best with a model: DRAM read bandwidth, and torch's bf16 linears at the model's shapes.

    machine_limits.py --model DIR [--threads 2]        prints one JSON object

Bandwidth is that of a plain sum over a buffer far larger than the caches, compiled here (torch's sum where there is no
compiler). The rates of the linears are torch's own, for the fused shapes of a Llama block, each over weights that were
not in the cache: they are a yardstick that anybody can repeat, and no bound on better kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUFFER_BYTES = 2 << 30
# Weights of one shape are read in turn from this many bytes of copies, so that none is in the cache when used again.
ROTATION_BYTES = 192 << 20
ROWS = (1, 8, 32, 64, 512)

READ_SOURCE = """
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t *data, size_t count, int threads) {
    uint64_t sum = 0;
    #pragma omp parallel for num_threads(threads) reduction(+:sum) schedule(static)
    for (size_t block = 0; block < count / 512; block++) {
        const uint64_t *p = data + block * 512;
        uint64_t a = 0;
        for (size_t i = 0; i < 512; i++) a += p[i];
        sum += a;
    }
    return sum;
}
"""


@dataclass(frozen=True)
class Shapes:
    """The matrices of one decoder: (rows N, columns K) of each linear of a block, and of the head."""

    block: dict[str, tuple[int, int]]
    head: tuple[int, int]
    num_layers: int

    @property
    def block_weights(self) -> int:
        return self.num_layers * sum(n * k for n, k in self.block.values())

    @property
    def weights(self) -> int:
        """Weights that one step reads, the head included and the embedding's few rows not."""
        return self.block_weights + self.head[0] * self.head[1]


def read_shapes(model: Path) -> Shapes:
    """The shapes of a checkpoint directory with a Llama-like config.json."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    qkv = (heads + 2 * config.get("num_key_value_heads", heads)) * head_dim
    block = {
        "qkv": (qkv, hidden),
        "o": (hidden, heads * head_dim),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    return Shapes(block, (config["vocab_size"], hidden), config["num_hidden_layers"])


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of `run` over `repeats` calls, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _compiled_reader() -> Callable[[int, int, int], object] | None:
    """read_all(address, count of 8-byte words, threads), or None without a working compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(READ_SOURCE)
        command = ["cc", "-O3", "-mavx2", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        function = ctypes.CDLL(str(library)).read_all
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_uint64
    return lambda address, count, threads: function(address, count, threads)


def dram_bandwidth(threads: int) -> dict[str, float]:
    """GB/s of reading: "plain" from 4 KiB pages, "huge" from 2 MiB pages where the kernel gives them, "one_thread"."""
    import torch

    reader = _compiled_reader()
    rates = {}
    for name, is_huge, count in (("plain", False, threads), ("huge", True, threads), ("one_thread", False, 1)):
        pages = mmap.mmap(-1, BUFFER_BYTES)
        pages.madvise(mmap.MADV_HUGEPAGE if is_huge else mmap.MADV_NOHUGEPAGE)
        buffer = torch.frombuffer(pages, dtype=torch.int64)
        buffer.fill_(1)
        if reader is None:
            torch.set_num_threads(count)
            seconds = median_seconds(buffer.sum, 5)
        else:
            address, words = buffer.data_ptr(), buffer.numel()
            seconds = median_seconds(lambda a=address, w=words, c=count: reader(a, w, c), 5)  # type: ignore[misc]
        rates[name] = BUFFER_BYTES / seconds / 1e9
        del buffer
        pages.close()
    torch.set_num_threads(threads)
    return rates


def linear_seconds(shape: tuple[int, int], rows: int) -> float:
    """Seconds of torch's bf16 linear, (rows, K) by (N, K), its weights from memory."""
    import torch

    n, k = shape
    copies = max(2, min(64, -(-ROTATION_BYTES // (2 * n * k))))
    weights = [torch.empty(n, k, dtype=torch.bfloat16).uniform_(-0.05, 0.05) for _ in range(1)]
    weights += [weights[0].clone() for _ in range(copies - 1)]
    x = torch.randn(rows, k).to(torch.bfloat16)
    turns = max(copies, 4)

    def run() -> None:
        for turn in range(turns):
            torch.nn.functional.linear(x, weights[turn % copies])

    return median_seconds(run, 3) / turns


def linear_rates(shapes: Shapes) -> dict[str, dict[str, float]]:
    """For each number of rows: GFLOP/s over all linears of a step, weight GB/s, and the tokens/s that they allow.

    512 rows stand for a prefill, whose head sees one row; the others for a decode step of that many sequences.
    """
    results = {}
    head = {rows: linear_seconds(shapes.head, rows) for rows in ROWS if rows != 512}
    for rows in ROWS:
        block = shapes.num_layers * sum(linear_seconds(shape, rows) for shape in shapes.block.values())
        step = block + head[1 if rows == 512 else rows]
        results[str(rows)] = {
            "gflops": 2 * rows * shapes.block_weights / block / 1e9,
            "weight_gb_s": 2 * shapes.block_weights / block / 1e9,
            "tokens_s": rows / step,
            "linears_only_tokens_s": rows / block,
        }
    return results


def measure(model: Path, threads: int) -> dict[str, Any]:
    """All limits for `model`, in GB/s, GFLOP/s and tokens/s."""
    import torch

    torch.set_num_threads(threads)
    shapes = read_shapes(model)
    dram = dram_bandwidth(threads)
    step_bytes = 2 * shapes.weights
    with torch.inference_mode():
        linears = linear_rates(shapes)
        yardstick = linear_seconds((8192, 2048), 512)
    return {
        "threads": threads,
        "dram_read_gb_s": dram,
        "weight_bytes_per_step": step_bytes,
        "one_stream_tokens_s": dram["plain"] * 1e9 / step_bytes,
        "torch_linears": linears,
        "torch_512x2048x8192_gflops": 2 * 512 * 2048 * 8192 / yardstick / 1e9,
        "prefill_tokens_s": linears["512"]["linears_only_tokens_s"],
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(json.dumps(measure(options.model, options.threads)))


if __name__ == "__main__":
    main()
