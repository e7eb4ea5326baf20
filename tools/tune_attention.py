"""Times tiles of attention over the cache on the GPU that is here, and writes the fastest into its file of
configurations.

    python tools/tune_attention.py --heads 32x8x128 [--caches bf16,i8,fp8e4nv] [--out FILE]

Tried are the tiles that fit a chip of this kind without spilling, as benchmarks/results/attention_tiles.json says
(tools/compile_kernels.py --candidates, without a GPU). Of each head size and cache the tile is kept that is fastest in
the geometric mean over the shapes of CASES, timed by Triton's do_bench (median, the L2 cache flushed between runs).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from tuning import DOES_NOT_FIT_US, card_here, time_us, write_card

from penstock.kernels.kv_layout import QUANTIZED_DTYPES
from penstock.kernels.triton import aot, attention, attention_tiles, configs, kv_layout

REPORT = Path(__file__).parents[1] / "benchmarks/results/attention_tiles.json"
CACHES = {"bf16": torch.bfloat16, "i8": torch.int8, "fp8e4nv": torch.float8_e4m3fn}
SLOTS = 16


class Case(NamedTuple):
    """So many requests with `new` tokens each, which see `context` tokens."""

    requests: int
    context: int
    new: int


CASES = {
    "decode": (Case(1, 8192, 1), Case(32, 1024, 1), Case(128, 4096, 1)),
    "prefill": (Case(1, 4096, 4096), Case(4, 8192, 1024), Case(16, 512, 512)),
}


class Heads(NamedTuple):
    """Query heads, key/value heads, and the size of each."""

    queries: int
    keys: int
    size: int


def main() -> int:
    arguments = _arguments()
    device, card = card_here()
    fitting = fitting_labels(REPORT.read_bytes(), card.capability)
    for heads in (Heads(*map(int, each.split("x"))) for each in arguments.heads.split(",")):
        for cache in (CACHES[each] for each in arguments.caches.split(",")):
            for kind, cases in CASES.items():
                runs = [attending(heads, cache, case, device) for case in cases]
                card = tuned(card, (kind, heads.size, cache), fitting, partial(mean_us, runs))
                print(f"{heads} {kind} {cache}: {card.attention}", flush=True)
    write_card(card, arguments.out)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", required=True, help="shapes HxGxD, by commas")
    parser.add_argument("--caches", default=",".join(CACHES))
    parser.add_argument("--out", default="", help="file; default: the card's, in the package")
    return parser.parse_args()


def fitting_labels(report: bytes, capability: int) -> set[str]:
    """Of the candidates that compile within a chip's limits, without spills. Report: of the newest chip not newer."""
    chip = max(each for each in aot.CAPABILITIES if each <= capability)
    kernels = json.loads(report)["kernels"]
    return {kernel["name"] for kernel in kernels if kernel["capability"] == chip and not kernel["problem"]}


def tuned(
    card: configs.Card,
    what: tuple[str, int, torch.dtype],
    fitting: set[str],
    measure: Callable[[configs.Card], float],
) -> configs.Card:
    """The card with the fastest tile of those that fit; as it was where none of them does.

    what: kind, head size, type of the cache. measure: microseconds of attention on a card with such tiles.
    """
    name = attention_tiles.tile_name(*what)
    trials = [
        msgspec.structs.replace(card, attention=card.attention | {name: tile})
        for tile in attention_tiles.candidates(what[0])
        if attention_tiles.label(name, tile) in fitting
    ]
    return min(trials, key=measure, default=card)


def attending(heads: Heads, cache: torch.dtype, case: Case, device: torch.device) -> Callable[[], object]:
    """Attention of one case over random keys and values, blocks in random order."""
    width = -(-case.context // SLOTS)
    tables = torch.randperm(case.requests * width, device=device).int().view(case.requests, width)
    lens = torch.full((case.requests,), case.context, dtype=torch.int32, device=device)
    starts = torch.arange(case.requests + 1, dtype=torch.int32, device=device) * case.new
    q = torch.randn(case.requests * case.new, heads.queries, heads.size, device=device).bfloat16()
    shape = kv_layout.cache_shape(case.requests * width, heads.keys, heads.size, cache)
    caches = [torch.randn(shape, device=device).to(cache) for _ in range(2)]
    if cache in QUANTIZED_DTYPES:
        for each in caches:
            kv_layout.codes_and_scales(each, heads.size)[1].fill_(1.0)
    bounds = attention.StepBounds(case.context, case.new)
    return partial(
        attention.paged_attention,
        q, (caches[0], caches[1]), (tables, lens, starts), heads.size**-0.5, bounds=bounds,
    )  # fmt: skip


def mean_us(runs: list[Callable[[], object]], card: configs.Card) -> float:
    """Geometric mean of the runs; very long where a tile does not fit one of them after all."""
    times = [time_us(run, card) for run in runs]
    return DOES_NOT_FIT_US if DOES_NOT_FIT_US in times else statistics.geometric_mean(times)


if __name__ == "__main__":
    sys.exit(main())
