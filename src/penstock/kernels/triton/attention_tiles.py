"""Tiles of attention over the cache: a card's own where they were tuned (configs.py), else these.

A name says what is attended: "decode_128_bf16" is one new token a request, heads of up to 128, a cache in bfloat16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import torch

from penstock.kernels.kv_layout import QUANTIZED_DTYPES
from penstock.kernels.triton.configs import AttentionTile
from penstock.kernels.triton.specialization import TYPE_NAMES

if TYPE_CHECKING:
    from penstock.kernels.triton.configs import Card

# By padded head size. Triton's pipeline gives half of the stages to the block table, whose entries are addresses of
# what follows: with five, two tiles of keys and of values are on their way, 64 KB at 128 in bfloat16; three such
# programs of decoding share a multiprocessor. Not measured on a GPU.
_DECODE: Final = {size: AttentionTile(0, 64 if size < 256 else 32, 4, 5) for size in (16, 32, 64, 128, 256)}
_PREFILL: Final = {
    16: AttentionTile(64, 64, 4, 5),
    32: AttentionTile(64, 64, 4, 5),
    64: AttentionTile(128, 64, 8, 5),
    128: AttentionTile(128, 64, 8, 5),
    256: AttentionTile(64, 32, 4, 5),
}
# What is compiled ahead of time, so that a card is asked for nothing that does not fit it.
TUNED_HEAD_SIZES: Final = (64, 128)
TUNED_CACHES: Final = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def tile_name(kind: str, padded: int, cache: torch.dtype) -> str:
    """kind: "decode" or "prefill". padded: the head size, a power of two."""
    return f"{kind}_{padded}_{TYPE_NAMES[cache]}"


def decode_tile(card: Card, padded: int, cache: torch.dtype) -> AttentionTile:
    """Its rows follow from the heads: it has none."""
    return card.attention.get(tile_name("decode", padded, cache), _DECODE[padded])


def prefill_tile(card: Card, padded: int, cache: torch.dtype) -> AttentionTile:
    """By default fewer slots where codes become floats in registers, or where elements are long."""
    tuned, default = card.attention.get(tile_name("prefill", padded, cache)), _PREFILL[padded]
    if tuned is not None:
        return tuned
    if cache == torch.float32:
        return AttentionTile(64, default.slots // 2, default.num_warps, default.num_stages)
    if cache in QUANTIZED_DTYPES:
        return AttentionTile(default.rows, default.slots // 2, default.num_warps, default.num_stages)
    return default


def candidates(kind: str) -> Iterator[AttentionTile]:
    """What tools/tune_attention.py may try, as far as it fits."""
    # A warp has the 16 rows of one instruction of the matrix units, of prefill as many as its tile needs.
    rows_and_warps = ((0, 4), (0, 8)) if kind == "decode" else ((64, 4), (128, 8))
    for (rows, warps), slots, stages in itertools.product(rows_and_warps, (32, 64, 128), (3, 5)):
        yield AttentionTile(rows, slots, warps, stages)


def label(name: str, tile: AttentionTile) -> str:
    """Of a candidate, in the report of those that were compiled."""
    return f"{name} {tile.rows}x{tile.slots} w{tile.num_warps} s{tile.num_stages}"
