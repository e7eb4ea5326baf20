#!/usr/bin/env python3
"""Attention of a 1B model's 16 layers over a KV cache in bfloat16, int8 and fp8: time beside bfloat16's, in turns.

    kv_cache.py [--threads 2] [--rounds 15] [--markdown FILE]

Caches are filled by the kernel that fills them in a model. A decode reads every layer's own cache, from memory; a
prefill is 512 new tokens at the end of the context.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from penstock.kernels import ops as op_table
from penstock.kernels.kv_layout import BLOCK_SLOTS
from penstock.kernels.ops import Ops

LAYERS, HEADS, KV_HEADS, DIM = 16, 32, 8, 64
CASES = ((1, 1, 2048), (1, 1, 16384), (8, 1, 4096), (32, 1, 1024), (64, 1, 1024), (1, 512, 8192))
DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ops = op_table.load("native", options.threads)
    lines = ["| sequences x new tokens of context | bf16, ms | int8, ratio | fp8, ratio |", "|---|---|---|---|"]
    print("\n".join(lines))
    for case in CASES:
        taken = measure(ops, case, options.rounds)
        ratios = [statistics.median(ours / plain for ours, plain in zip(taken[name], taken["bf16"], strict=True))
                  for name in ("int8", "fp8")]  # fmt: skip
        shape = "{} x {} of {}".format(*case)
        lines.append(f"| {shape} | {1e3 * statistics.median(taken['bf16']):.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
        print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("".join(f"{line}\n" for line in lines))


def measure(ops: Ops, case: tuple[int, int, int], rounds: int) -> dict[str, list[float]]:
    requests, new_tokens, context = case
    slots = requests * context
    qkv = torch.randn(slots, (HEADS + 2 * KV_HEADS) * DIM).to(torch.bfloat16)
    cos, sin = torch.rand(2, slots, DIM // 2).unbind()
    caches = {}
    for name, dtype in DTYPES.items():
        caches[name] = ops.layouts.empty_caches(LAYERS, slots // BLOCK_SLOTS, KV_HEADS, DIM, dtype)
        for keys, values in caches[name]:
            ops.rope_and_cache(qkv, cos, sin, keys, values, torch.arange(slots))
    q = torch.randn(requests * new_tokens, HEADS, DIM).to(torch.bfloat16)
    tables = torch.randperm(slots // BLOCK_SLOTS, dtype=torch.int32).view(requests, -1)
    lens = torch.full((requests,), context, dtype=torch.int32)
    starts = torch.arange(requests + 1, dtype=torch.int32) * new_tokens
    taken: dict[str, list[float]] = {name: [] for name in DTYPES}
    for _ in range(rounds):
        for name, layers in caches.items():
            start_s = time.perf_counter()
            for keys, values in layers:
                ops.paged_attention(q, keys, values, tables, lens, starts, DIM**-0.5)
            taken[name].append(time.perf_counter() - start_s)
    return taken


if __name__ == "__main__":
    main()
