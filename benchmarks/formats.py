#!/usr/bin/env python3
"""Every weight format on every instruction set that works here: one token (read from memory), and 64.

formats.py [--threads 2] [--seconds 0.1] [--only TEXT] [--isa avx2,avx512] [--markdown FILE]

A linear of 8192 x 2048, bfloat16 activations. One token: GB of packed weights a second, over weights that together
exceed the caches. 64 tokens: billions of multiply-adds a second, counted twice. Medians; formats alternate with
instruction sets, so that a change of the machine's speed meets all alike.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import torch

from penstock import _native
from penstock.kernels import ops as op_table
from penstock.kernels import quantized
from penstock.kernels.ops import Ops
from penstock.kernels.quantized import (
    GGUF_LAYOUTS,
    INT8_CHANNEL,
    NF4,
    W8A8,
    QuantizedLinear,
    WeightLayout,
    w4a16,
    with_int8_activations,
)

N, K, TOKENS = 8192, 2048, 64
ROTATION_BYTES = 160 << 20
GGUF_NAMES = (
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4", "Q3_K", "Q2_K",
)  # fmt: skip
LAYOUTS: dict[str, WeightLayout] = {
    **{name: GGUF_LAYOUTS[getattr(quantized, name)] for name in GGUF_NAMES},
    "int8 (online)": INT8_CHANNEL,
    "W8A8": W8A8,
    "W4A16": w4a16(128),
    "GPTQ, AWQ (2 to 4 bits)": w4a16(128, "f16", "point"),
    "GPTQ (8 bits)": WeightLayout(8, 128, "float", "f16", "point"),
    "FP8": quantized.fp8(),
    "NF4": NF4,
    "LLM.int8": WeightLayout(8, 256, "float", "f32", offset=128),
}
LAYOUTS |= {
    f"{name}, --activations int8": with_int8_activations(LAYOUTS[name])
    for name in ("W4A16", "GPTQ, AWQ (2 to 4 bits)", "GPTQ (8 bits)", "LLM.int8")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.1, help="per figure")
    parser.add_argument("--only", default="", help="formats whose name has one of these texts, with ; between")
    parser.add_argument("--isa", help="comma-separated [all that work]")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    working = [name for name, works, _ in _native.isa_statuses() if works]
    names = options.isa.split(",") if options.isa else working
    tables = {name: op_table.load("native", options.threads, name) for name in names}
    columns = [f"{name}: {what}" for what in ("1 token, GB/s", "64 tokens, GOP/s") for name in names]
    lines = [f"| format | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    print("\n".join(lines))
    wanted = {name: layout for name, layout in LAYOUTS.items() if any(text in name for text in options.only.split(";"))}
    for format_name, layout in wanted.items():
        weights = random_weights(layout)
        alone = [seconds(ops, weights, 1, options.seconds) for ops in tables.values()]
        many = [seconds(ops, weights, TOKENS, options.seconds) for ops in tables.values()]
        cells = [f"{weights[0].nbytes / taken / 1e9:.1f}" for taken in alone]
        cells += [f"{2 * TOKENS * N * K / taken / 1e9:.0f}" for taken in many]
        lines.append(f"| {format_name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


def random_weights(layout: WeightLayout) -> list[QuantizedLinear]:
    first = quantized.empty_quantized(N, K, layout, torch.bfloat16)
    count = max(2, ROTATION_BYTES // first.nbytes)
    weights = [first, *(quantized.empty_quantized(N, K, layout, torch.bfloat16) for _ in range(count - 1))]
    for weight in weights:
        weight.data.random_(0, 60)  # finite scales
    return weights


def seconds(ops: Ops, weights: list[QuantizedLinear], tokens: int, budget_s: float) -> float:
    """Of one multiplication, the median over the budget."""
    x = torch.randn(tokens, K).to(torch.bfloat16)
    taken: list[float] = []
    ends_s = time.perf_counter() + budget_s
    for weight in itertools.cycle(weights):
        start_s = time.perf_counter()
        ops.linear(x, weight)
        now_s = time.perf_counter()
        taken.append(now_s - start_s)
        if now_s > ends_s and len(taken) > 3:
            return statistics.median(taken[1:])
    raise AssertionError("the cycle has no end")


if __name__ == "__main__":
    main()
