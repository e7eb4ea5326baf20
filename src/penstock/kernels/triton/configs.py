"""Tiles, warps, stages and splits of the matrix kernels, and attention's tiles, as data for each card (configs/*.json).

A family is what a kernel multiplies: "codes2", "codes4", "codes6", "codes8" (groups of 128 and more), the same with
"_fine" (smaller groups), "fp8", "int8", "bf16". The tile may depend on the number of tokens; the number of ranges
that K is cut into may not, for it decides in which order a row is summed: it follows from the weight's shape.
tools/tune_kernels.py measures on a card and writes its file; until then a file says "measured": false, and holds what
compiles without spills; splits it does not name come from the cost model `num_splits`, tiles of attention from
attention_tiles.py (tools/tune_attention.py measures those).
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Annotated, Final

import msgspec
import torch

from penstock.base.errors import ConfigError

MAX_SPLITS: Final = 16
# Programs that keep a card busy: two a multiprocessor.
_PROGRAMS_A_MULTIPROCESSOR: Final = 2
# Steps of K that are worth a program of its own.
_MIN_STEPS: Final = 4
_MAX_WALKED_TOKENS: Final = 64
_MAX_FILE_BYTES: Final = 1 << 20
# AMD's chips have 64 KiB of shared memory for a program, and Triton keeps one tile less than there are stages.
AMD_STAGES: Final = 2


class Tile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For up to max_tokens tokens: a tile of block_m tokens and block_n outputs, and how it is compiled."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
    block_m: Annotated[int, msgspec.Meta(ge=16, le=256, multiple_of=16)]
    block_n: Annotated[int, msgspec.Meta(ge=64, le=256, multiple_of=64)]
    num_warps: Annotated[int, msgspec.Meta(ge=4, le=8, multiple_of=4)]
    num_stages: Annotated[int, msgspec.Meta(ge=1, le=8)]


class AttentionTile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows (0: of decoding, where the heads decide) and slots of the cache that a program takes, and its compilation.

    rows, slots and num_warps: powers of two.
    """

    rows: Annotated[int, msgspec.Meta(ge=0, le=256)]
    slots: Annotated[int, msgspec.Meta(ge=16, le=256)]
    num_warps: Annotated[int, msgspec.Meta(ge=2, le=16)]
    num_stages: Annotated[int, msgspec.Meta(ge=1, le=8)]

    def is_for(self, name: str) -> bool:
        """Whether it can be launched for what `name` (attention_tiles.tile_name) says."""
        has_powers = all(size & (size - 1) == 0 for size in (self.rows, self.slots, self.num_warps))
        return has_powers and (self.rows >= 16 if name.startswith("prefill") else self.rows == 0)


_AttentionName = Annotated[
    str, msgspec.Meta(pattern="^(decode|prefill)_(16|32|64|128|256)_(bf16|fp32|i8|fp8e4nv)$", max_length=32)
]


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of one card. capability: as 80 or 90. splits: by family, of weights "NxK".

    tensor_copies: whether the large tiles of "fp8", "int8" and "bf16" are read by Hopper's copy engine; from 90 on.
    attention: tiles by attention_tiles.tile_name, where they were tuned.
    """

    card: Annotated[str, msgspec.Meta(max_length=100)]
    measured: bool
    capability: Annotated[int, msgspec.Meta(ge=80, le=200)]
    multiprocessors: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    tiles: dict[str, Annotated[list[Tile], msgspec.Meta(min_length=1, max_length=16)]]
    splits: dict[str, dict[str, Annotated[int, msgspec.Meta(ge=1, le=MAX_SPLITS)]]] = {}
    tensor_copies: bool = False
    attention: dict[_AttentionName, AttentionTile] = {}

    def walked_tile(self, family: str, num_tokens: int) -> Tile:
        """For programs that walk several ranges of K: they keep a sum more, so their tiles stay small."""
        return self.tile(family, min(num_tokens, _MAX_WALKED_TOKENS))

    def tile(self, family: str, num_tokens: int) -> Tile:
        """The first that is large enough for so many tokens."""
        tiles = self.tiles[family]
        return next((tile for tile in tiles if tile.max_tokens >= num_tokens), tiles[-1])

    def split(self, family: str, n: int, k: int, step: int) -> int:
        """Into how many ranges K is cut; step: inputs that a kernel takes at once."""
        stored = self.splits.get(family, {}).get(f"{n}x{k}")
        return num_splits(n, k, step, self.multiprocessors) if stored is None else min(stored, -(-k // step))


def num_splits(n: int, k: int, step: int, multiprocessors: int, block_n: int = 128) -> int:
    """The cost model: as many ranges as fill the card with a single tile of tokens, none shorter than four steps.

    A power of two: a split reads its partial sums back, so more than needed costs.
    """
    programs, steps, splits = -(-n // block_n), -(-k // step), 1
    while (
        programs * splits < _PROGRAMS_A_MULTIPROCESSOR * multiprocessors
        and steps // (2 * splits) >= _MIN_STEPS
        and 2 * splits <= MAX_SPLITS
    ):
        splits *= 2
    return splits


def parse(data: bytes, name: str) -> Card:
    """A card's file. ConfigError: it is not one, or a number is out of its bounds."""
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{name} has {len(data)} bytes.", remedy="Write it anew with tools/tune_kernels.py.")
    try:
        card = msgspec.json.decode(data, type=Card)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{name}: {error}.", remedy="Write it anew with tools/tune_kernels.py.") from error
    missing = sorted(set(FAMILIES) - set(card.tiles))
    if missing:
        raise ConfigError(f"{name} has no tiles for {', '.join(missing)}.", remedy="Run tools/tune_kernels.py.")
    for attended, tile in card.attention.items():
        if not tile.is_for(attended):
            raise ConfigError(f"{name}: {tile} is no tile of {attended}.", remedy="Run tools/tune_attention.py.")
    return card


FAMILIES: Final = (
    "codes2", "codes2_fine", "codes4", "codes4_fine", "codes6", "codes6_fine", "codes8", "codes8_fine", "fp8", "int8",
    "bf16",
)  # fmt: skip


def file_name(card: str) -> str:
    """Of a card by the name that its driver says."""
    return re.sub(r"[^A-Za-z0-9]+", "_", card)[:100] + ".json"


@cache
def of_device(device: torch.device) -> Card:
    """The card a tensor lies on. One without a file of its own gets an A100's, H100's or B200's tiles."""
    if device.type != "cuda":
        return read("NVIDIA_H100.json")  # the interpreter
    properties = torch.cuda.get_device_properties(device)
    # Of AMD's cards none has NVIDIA's e4m3 or its tensor copies.
    capability = 80 if torch.version.hip else 10 * properties.major + properties.minor
    card = next(
        (read(name) for name in (file_name(properties.name), _of_family(properties.name)) if _exists(name)),
        read(f"NVIDIA_{'B200' if capability >= 100 else 'H100' if capability >= 90 else 'A100'}.json"),
    )
    return msgspec.structs.replace(card, capability=capability, multiprocessors=properties.multi_processor_count)


def stages(count: int) -> int:
    """How many tiles are on their way at once, where NVIDIA's chips would have `count`."""
    return min(count, AMD_STAGES) if torch.version.hip else count


def _of_family(card: str) -> str:
    """ "NVIDIA H100 80GB HBM3" is an H100."""
    return file_name(" ".join(card.split()[:2]))


def _exists(name: str) -> bool:
    return (resources.files("penstock.kernels.triton") / "configs" / name).is_file()


@cache
def read(name: str) -> Card:
    """A file of configs/."""
    return parse((resources.files("penstock.kernels.triton") / "configs" / name).read_bytes(), name)
