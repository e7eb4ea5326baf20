"""Measures tiles and splits of the matrix kernels on the GPU that is here, and writes its file of configurations.

    python tools/tune_kernels.py --weights 6144x4096,4096x4096,28672x4096 [--families codes4,fp8] [--out FILE]

Of each family and number of tokens the fastest tile over all weights is kept, of each weight the fastest split of K at
one token; the file says "measured": true then. Weights are random; each candidate is timed by Triton's do_bench
(median, the L2 cache flushed between runs). Needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence

import msgspec
import torch
from tuning import card_here, time_us, write_card

from penstock.kernels.packed import PackedLinear
from penstock.kernels.quantized import GGUF_LAYOUTS, W8A8, W8A16, QuantizedLinear, WeightLayout, fp8, w4a16
from penstock.kernels.triton import configs, linear, weights

TOKENS = (1, 16, 32, 64, 256, 2048)
SPLITS = (1, 2, 4, 8, 16)
# One layout of each family; None: floats.
LAYOUTS: dict[str, WeightLayout | None] = {
    "codes2_fine": GGUF_LAYOUTS[10],
    "codes4": w4a16(128),
    "codes4_fine": GGUF_LAYOUTS[12],
    "codes6_fine": GGUF_LAYOUTS[14],
    "codes8": W8A16,
    "codes8_fine": GGUF_LAYOUTS[8],
    "fp8": fp8("e4m3", 128),
    "int8": W8A8,
    "bf16": None,
}
Weight = PackedLinear | QuantizedLinear


def main() -> int:
    arguments = _arguments()
    device, card = card_here()
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in arguments.weights.split(",")]
    for family in arguments.families.split(","):
        matrices = [_random_weight(LAYOUTS[family], n, k, device, card.capability) for n, k in shapes]
        card = _with_splits(card, family, matrices, device)
        card = _with_tiles(card, family, matrices, device)
        print(f"{family}: {card.splits[family]} {card.tiles[family]}", flush=True)
    write_card(card, arguments.out)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="shapes NxK, by commas")
    parser.add_argument("--families", default=",".join(LAYOUTS))
    parser.add_argument("--out", default="", help="file; default: the card's, in the package")
    return parser.parse_args()


def candidates() -> Iterator[tuple[int, int, int, int]]:
    """(block_m, block_n, warps, stages)."""
    yield from itertools.product((16, 32, 64, 128), (64, 128), (4, 8), (2, 3, 4, 5, 6))


def _random_weight(layout: WeightLayout | None, n: int, k: int, device: torch.device, capability: int) -> Weight:
    if layout is None:
        weight = weights.empty_linear(n, k, torch.bfloat16, device)
        weight.data.normal_()
        return weight
    packed = weights.empty_quantized(n, k, layout, torch.bfloat16, device, capability)
    packed.codes.copy_(torch.randint(0, 100, packed.codes.shape, device=device))
    return packed


def _with_splits(card: configs.Card, family: str, matrices: Sequence[Weight], device: torch.device) -> configs.Card:
    chosen = {}
    for weight in matrices:
        shape = f"{weight.n}x{weight.k}"
        times = {}
        for split in SPLITS:
            trial = msgspec.structs.replace(card, splits=card.splits | {family: {shape: split}})
            times[split] = _time_us(trial, weight, 1, device)
        chosen[shape] = min(times, key=lambda split: times[split])
    return msgspec.structs.replace(card, splits=card.splits | {family: card.splits.get(family, {}) | chosen})


def _with_tiles(card: configs.Card, family: str, matrices: Sequence[Weight], device: torch.device) -> configs.Card:
    tiles = []
    for tokens in TOKENS:
        best, fastest = None, float("inf")
        for block_m, block_n, warps, stages in candidates():
            if block_m > max(16, 2 * tokens):
                continue
            tile = configs.Tile(1 << 30 if tokens == TOKENS[-1] else tokens, block_m, block_n, warps, stages)
            trial = msgspec.structs.replace(card, tiles=card.tiles | {family: [tile]})
            time_us = statistics.geometric_mean(_time_us(trial, weight, tokens, device) for weight in matrices)
            if time_us < fastest:
                best, fastest = tile, time_us
        assert best is not None, "no tile fits this card"
        tiles.append(best)
    return msgspec.structs.replace(card, tiles=card.tiles | {family: tiles})


def _time_us(card: configs.Card, weight: Weight, tokens: int, device: torch.device) -> float:
    """Of one linear."""
    x = torch.randn(tokens, weight.k, dtype=torch.bfloat16, device=device)
    return time_us(lambda: linear.linear(x, weight, row_invariant=True), card)


if __name__ == "__main__":
    sys.exit(main())
