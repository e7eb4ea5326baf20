"""Quantised linear weights in the layout the kernels read: few bits a code, a scale a group (csrc/ops/quantized.h).

A weight [N, K] is cut into tiles of 16 outputs, a tile into steps of `step` inputs. A step is a header (scales and
minimums of its groups) and then codes, in vectors of 64 bytes, each output's bytes side by side:
  activations "int8", vectors [16][4 bytes]: a byte of unit u (4 inputs) is
    8 bits   vector u
    4 bits   vector u / 2, the lower half of the byte for even u        (also the lower 4 bits of 5 and 6)
    2 bits   vector u / 4, bits 2 (u % 4) and the next                  (also the upper 2 of 6, the lower 2 of 3)
    1 bit    vector u / 8, bit u % 8                                    (the upper 1 of 5 and 3)
    A vector of upper bits follows those with the lower bits of the same units, so that memory is read in one stream.
  activations "float", units of 2 inputs:
    8 bits   [step / 2][16][2]
    4 bits   vectors [16][2 words]: bits 4 j and up of the word of input i are those of unit 4 v + j
Headers: [groups][16] scales, then minimums, or points of one byte. "super": [16] f16 scales (and [16] f16 minimums) of
256 inputs, then [groups][16] int8 factors (and as many for the minimums). Without groups, the scales (f32) stand
behind all tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from penstock.kernels import huge_pages
from penstock.kernels.packed import TILE_COLUMNS, Empty

VECTOR_BYTES: Final = 64
SUPER_GROUP: Final = 256
SCALE_DTYPES: Final = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "super": torch.float16}


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """What the codes of a weight mean, and how they are multiplied.

    bits: of a code. group_size: inputs that share a scale; 0: a whole row does.
    activations: "int8", x is quantised per token and multiplied as integers; "float", codes become bf16 or f32.
    scales: how they are kept: "f16", "bf16", "f32", or "super" (int8 a group, times f16 for 256 inputs).
    minimums: "none"; "own", value = scale * code + minimum, kept as the scales are; "point", value =
    scale * (code - point).
    values: "integer", value = scale * (code - offset); or a table: "iq4_nl", "mxfp4", "nf4", "e4m3", "e5m2".
    x_block: inputs of a token that share an activation scale; 0: all do.
    """

    bits: int
    group_size: int
    activations: str
    scales: str
    minimums: str = "none"
    values: str = "integer"
    offset: int = 0
    x_block: int = SUPER_GROUP

    @property
    def step(self) -> int:
        """Inputs of a step."""
        if self.scales == "super":
            return SUPER_GROUP
        return max(self.group_size, 64)

    @property
    def groups_per_step(self) -> int:
        return self.step // self.group_size if self.group_size else 0

    @property
    def num_supers(self) -> int:
        """Scales of 256 inputs in a header: the scales' and the minimums'."""
        return 0 if self.scales != "super" else 2 if self.minimums == "own" else 1

    @property
    def scale_bytes(self) -> int:
        """Of one group's scale."""
        return 1 if self.scales == "super" else SCALE_DTYPES[self.scales].itemsize

    @property
    def minimum_bytes(self) -> int:
        """Of one group's minimum."""
        return {"none": 0, "point": 1, "own": self.scale_bytes}[self.minimums]

    @property
    def header_bytes(self) -> int:
        used = 2 * self.num_supers + self.groups_per_step * (self.scale_bytes + self.minimum_bytes)
        return _round_up(TILE_COLUMNS * used, VECTOR_BYTES)

    @property
    def step_bytes(self) -> int:
        return self.header_bytes + TILE_COLUMNS * self.step * self.bits // 8

    def __post_init__(self) -> None:
        assert self.bits in ((2, 3, 4, 5, 6, 8) if self.activations == "int8" else (4, 8)), self
        assert self.group_size in (0, 16, 32, 64, 128, 256), self
        assert self.group_size or (self.bits, self.scales, self.minimums, self.activations) == (
            8,
            "f32",
            "none",
            "int8",
        )
        assert self.scales in SCALE_DTYPES and self.minimums in ("none", "own", "point"), self
        assert self.scales != "super" or (self.minimums != "point" and self.activations == "int8"), self
        assert self.minimums == "none" or self.offset == 0, self
        assert self.values == "integer" or self.minimums == "none", self
        assert self.x_block in (0, SUPER_GROUP), self


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A weight [n, k], packed. dtype: of the activations it is multiplied with (bfloat16 or float32)."""

    data: Tensor
    n: int
    k: int
    layout: WeightLayout
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def activations(self) -> str:
        """The type that inputs are multiplied in."""
        return "int8" if self.layout.activations == "int8" else str(self.dtype).removeprefix("torch.")

    @property
    def held_as(self) -> str:
        """See PackedLinear."""
        values = f"int{self.layout.bits}" if self.layout.values == "integer" else self.layout.values
        return f"{values}, inputs in {self.activations}"

    @property
    def num_tiles(self) -> int:
        return -(-self.n // TILE_COLUMNS)

    @property
    def num_steps(self) -> int:
        return -(-self.k // self.layout.step)

    def steps(self) -> Tensor:
        """A view [tiles, steps, step_bytes]."""
        shape = (self.num_tiles, self.num_steps, self.layout.step_bytes)
        return self.data[: shape[0] * shape[1] * shape[2]].view(shape)

    def row_scales(self) -> Tensor:
        """A view float32 [n_padded]: the scales where a row has one."""
        return self.data[-4 * self.num_tiles * TILE_COLUMNS :].view(torch.float32)


def quantized_nbytes(n: int, k: int, layout: WeightLayout) -> int:
    """Bytes that a packed [n, k] takes."""
    tiles = -(-n // TILE_COLUMNS)
    row_scales = 0 if layout.group_size else 4 * TILE_COLUMNS
    return tiles * (-(-k // layout.step) * layout.step_bytes + row_scales)


def empty_quantized(
    n: int, k: int, layout: WeightLayout, dtype: torch.dtype, empty: Empty = huge_pages.empty
) -> QuantizedLinear:
    """An unfilled packed weight; the rows that pad the last tile are zero. empty: gives memory."""
    assert n > 0, n
    assert k > 0, k
    assert dtype in (torch.float32, torch.bfloat16), dtype
    packed = QuantizedLinear(empty(quantized_nbytes(n, k, layout), torch.uint8), n, k, layout, dtype)
    if n % TILE_COLUMNS:
        packed.steps()[-1].zero_()
    if not layout.group_size:
        packed.row_scales()[n:] = 0.0
    return packed


# GGUF's types by their numbers (ggml.h).
Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4 = (
    2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 39,
)  # fmt: skip
GGUF_LAYOUTS: Final = {
    Q4_0: WeightLayout(4, 32, "int8", "f16", offset=8),
    Q4_1: WeightLayout(4, 32, "int8", "f16", "own"),
    Q5_0: WeightLayout(5, 32, "int8", "f16", offset=16),
    Q5_1: WeightLayout(5, 32, "int8", "f16", "own"),
    Q8_0: WeightLayout(8, 32, "int8", "f16", offset=128),
    Q2_K: WeightLayout(2, 16, "int8", "super", "own"),
    Q3_K: WeightLayout(3, 16, "int8", "super", offset=4),
    Q4_K: WeightLayout(4, 32, "int8", "super", "own"),
    Q5_K: WeightLayout(5, 32, "int8", "super", "own"),
    Q6_K: WeightLayout(6, 16, "int8", "super", offset=32),
    IQ4_NL: WeightLayout(4, 32, "int8", "f16", values="iq4_nl"),
    IQ4_XS: WeightLayout(4, 32, "int8", "super", values="iq4_nl"),
    MXFP4: WeightLayout(4, 32, "int8", "bf16", values="mxfp4"),
}
INT8_CHANNEL: Final = WeightLayout(8, 0, "int8", "f32", offset=128)
W8A8: Final = WeightLayout(8, 0, "int8", "f32", offset=128, x_block=0)
INT4: Final = GGUF_LAYOUTS[Q4_0]
NF4: Final = WeightLayout(4, 64, "float", "f32", values="nf4")
W8A16: Final = WeightLayout(8, 128, "float", "f16", offset=128)


def w4a16(group_size: int, scales: str = "f16", minimums: str = "none") -> WeightLayout:
    """Codes of 4 bits times activations as they are: symmetric (code - 8) or with a zero point ("point") a group."""
    return WeightLayout(4, group_size, "float", scales, minimums, offset=8 if minimums == "none" else 0)


def fp8(values: str = "e4m3", group_size: int = SUPER_GROUP, scales: str = "f32") -> WeightLayout:
    """FP8 codes times activations as they are."""
    return WeightLayout(8, group_size, "float", scales, values=values)


def with_int8_activations(layout: WeightLayout) -> WeightLayout:
    """The same weights, multiplied as integers; as it is where their values are none (FP8, NF4)."""
    return replace(layout, activations="int8") if layout.values == "integer" else layout
