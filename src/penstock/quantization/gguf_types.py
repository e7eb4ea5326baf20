"""Exact values of every GGUF tensor type: bit for bit what ggml's own dequantization gives in float32.

A row is a sequence of blocks. Most hold small integers with a scale (and a minimum) for each group of 16 or 32; the K
types scale those scales once more for 256 values; the IQ types name entries of a code book.
Source of the layouts: github.com/ggml-org/ggml (ggml-common.h, ggml-quants.c).

Shapes: N blocks, and below each the bytes or values of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from penstock.loader.gguf_file import block_of
from penstock.quantization.gguf_books import code_book

FLOAT_TYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

_IQ4_VALUES: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4_VALUES: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled
_IQ1_DELTA: Final = 0.125


def dequantize(tensor_type: str, rows: Tensor) -> Tensor:
    """Rows as stored, uint8 [R, row bytes], to float32 [R, K]."""
    rows = rows.contiguous()
    if tensor_type in FLOAT_TYPES:
        return rows.view(FLOAT_TYPES[tensor_type]).float()
    _, size = block_of(tensor_type)
    values = _VALUES[tensor_type](rows.view(-1, size))
    return values.reshape(rows.shape[0], -1)


def is_known(tensor_type: str) -> bool:
    return tensor_type in FLOAT_TYPES or tensor_type in _VALUES


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block -> float32 [N, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _words(blocks: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Bytes [begin, end) of each block as little-endian whole numbers (widened to int64) [N, count]."""
    words = blocks[:, begin:end].contiguous().view(dtype).long()
    return words & ((1 << 8 * dtype.itemsize) - 1)


def _shifted(bytes_NB: Tensor, shifts: tuple[int, ...], run: int, mask: int) -> Tensor:
    """Bit fields: of each run of bytes all fields at the first shift, then at the next -> uint8 [N, values]."""
    runs = bytes_NB.reshape(bytes_NB.shape[0], -1, 1, run)
    places = torch.tensor(shifts, dtype=torch.uint8)[None, None, :, None]
    return ((runs >> places) & mask).flatten(1)


def _nibbles(bytes_NB: Tensor, run: int) -> Tensor:
    return _shifted(bytes_NB, (0, 4), run, 15)


def _scaled(codes_NK: Tensor, scales_NG: Tensor, minimums_NG: Tensor | None = None) -> Tensor:
    """codes * scales (- minimums) by group -> float32 [N, K]."""
    count, groups = scales_NG.shape
    values = scales_NG[:, :, None] * codes_NK.view(count, groups, -1).float()
    if minimums_NG is not None:
        values -= minimums_NG[:, :, None]
    return values.flatten(1)


def _table(values: tuple[int, ...], codes: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[codes.long()]


def _q4_0(blocks: Tensor) -> Tensor:
    return _scaled(_nibbles(blocks[:, 2:], 16).to(torch.int8) - 8, _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _scaled(_nibbles(blocks[:, 4:], 16), _half(blocks, 0), -_half(blocks, 2))


def _fifth_bits(blocks: Tensor, begin: int) -> Tensor:
    """32 bits from byte `begin` on, one a value -> uint8 [N, 32], each 0 or 16."""
    bits = (blocks[:, begin : begin + 4, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks, 2)
    return _scaled(codes.to(torch.int8) - 16, _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    return _scaled(_nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks, 4), _half(blocks, 0), -_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return _scaled(blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    packed, d, d_min = blocks[:, :16], _half(blocks, 80), _half(blocks, 82)
    codes = _shifted(blocks[:, 16:80], (0, 2, 4, 6), 32, 3)
    return _scaled(codes, d * (packed & 15).float(), d_min * (packed >> 4).float())


def _q3_k(blocks: Tensor) -> Tensor:
    high = _shifted(blocks[:, :32], tuple(range(8)), 32, 1)
    codes = _shifted(blocks[:, 32:96], (0, 2, 4, 6), 32, 3).to(torch.int8) - ((1 - high.to(torch.int8)) << 2)
    low_scales = _nibbles(blocks[:, 96:104], 8)
    scales = low_scales | (_shifted(blocks[:, 104:108], (0, 2, 4, 6), 4, 3) << 4)
    return _scaled(codes, _half(blocks, 108) * (scales.to(torch.int8) - 32).float())


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's eight scales and minimums of six bits each -> float32 [N, 8] both."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], 1)
    minimums = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], 1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * minimums.float()


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled(_nibbles(blocks[:, 16:], 32), *_k_scales(blocks))


def _q5_k(blocks: Tensor) -> Tensor:
    high = _shifted(blocks[:, 16:48], tuple(range(8)), 32, 1)
    return _scaled(_nibbles(blocks[:, 48:], 32) | (high << 4), *_k_scales(blocks))


def _q6_k(blocks: Tensor) -> Tensor:
    high = _shifted(blocks[:, 128:192], (0, 2, 4, 6), 32, 3)
    codes = (_nibbles(blocks[:, :128], 64) | (high << 4)).to(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _scaled(codes, _half(blocks, 208) * scales)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _scaled(_table(_IQ4_VALUES, _nibbles(blocks[:, 2:], 16)), _half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Tensor:
    high = (_words(blocks, 2, 4, torch.int16) >> (2 * torch.arange(8))) & 3
    scales = _nibbles(blocks[:, 4:8], 1).long() | (high << 4)
    codes = _nibbles(blocks[:, 8:], 16)
    return _scaled(_table(_IQ4_VALUES, codes), _half(blocks, 0) * (scales - 32).float())


def _mxfp4(blocks: Tensor) -> Tensor:
    """The scale is 2 ** (byte - 128): half of E8M0's, for the values are doubled."""
    exponent = blocks[:, :1].to(torch.int32)
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return _scaled(_table(_FP4_VALUES, _nibbles(blocks[:, 1:], 16)), bits.view(torch.float32))


def _signs(bytes_NS: Tensor) -> Tensor:
    """One sign a bit, lowest first -> float32 [N, 8 S]."""
    bits = (bytes_NS.long()[:, :, None] >> torch.arange(8)) & 1
    return (1 - 2 * bits).flatten(1).float()


def _even_signs(indices_NS: Tensor) -> Tensor:
    """Seven signs each; the eighth makes their number of minuses even -> float32 [N, 8 S]."""
    parity = sum((indices_NS >> bit) & 1 for bit in range(7)) & 1
    return _signs(indices_NS | (parity << 7))


def _from_book(name: str, indices_NE: Tensor) -> Tensor:
    return code_book(name)[indices_NE].flatten(1)


def _iq2_xxs(blocks: Tensor) -> Tensor:
    words = _words(blocks, 2, 66, torch.int32).view(blocks.shape[0], 8, 2)
    indices = (words[:, :, 0, None] >> torch.tensor((0, 8, 16, 24))) & 255
    signs = (words[:, :, 1, None] >> torch.tensor((0, 7, 14, 21))) & 127
    scales = _half(blocks, 0) * (0.5 + (words[:, :, 1] >> 28).float()) * 0.25
    return _scaled(_from_book("IQ2_XXS", indices.flatten(1)), scales) * _even_signs(signs.flatten(1))


def _iq2_xs(blocks: Tensor) -> Tensor:
    words = _words(blocks, 2, 66, torch.int16)
    scales = _half(blocks, 0) * (0.5 + _nibbles(blocks[:, 66:], 1).float()) * 0.25
    return _scaled(_from_book("IQ2_XS", words & 511), scales) * _even_signs(words >> 9)


def _iq2_s(blocks: Tensor) -> Tensor:
    high = _shifted(blocks[:, 66:74], (0, 2, 4, 6), 1, 3).long()
    scales = _half(blocks, 0) * (0.5 + _nibbles(blocks[:, 74:], 1).float()) * 0.25
    return _scaled(_from_book("IQ2_S", blocks[:, 2:34].long() | (high << 8)), scales) * _signs(blocks[:, 34:66])


def _iq3_xxs(blocks: Tensor) -> Tensor:
    words = _words(blocks, 66, 98, torch.int32)
    signs = (words[:, :, None] >> torch.tensor((0, 7, 14, 21))) & 127
    scales = _half(blocks, 0) * (0.5 + (words >> 28).float()) * 0.5
    return _scaled(_from_book("IQ3_XXS", blocks[:, 2:66].long()), scales) * _even_signs(signs.flatten(1))


def _iq3_s(blocks: Tensor) -> Tensor:
    high = _shifted(blocks[:, 66:74], tuple(range(8)), 1, 1).long()
    scales = _half(blocks, 0) * (1 + 2 * _nibbles(blocks[:, 106:], 1)).float()
    return _scaled(_from_book("IQ3_S", blocks[:, 2:66].long() | (high << 8)), scales) * _signs(blocks[:, 74:106])


def _iq1_values(indices_NE: Tensor, is_down_NG: Tensor, scales_NG: Tensor) -> Tensor:
    """Entries of the book, moved by an eighth up or down by group, scaled by group."""
    count, groups = is_down_NG.shape
    delta = torch.where(is_down_NG, -_IQ1_DELTA, _IQ1_DELTA)
    entries = _from_book("IQ1_S", indices_NE).view(count, groups, -1) + delta[:, :, None]
    return _scaled(entries.flatten(1), scales_NG)


def _iq1_s(blocks: Tensor) -> Tensor:
    words = _words(blocks, 34, 50, torch.int16)
    high = (words[:, :, None] >> torch.tensor((0, 3, 6, 9))) & 7
    scales = _half(blocks, 0) * (2 * ((words >> 12) & 7) + 1).float()
    return _iq1_values(blocks[:, 2:34].long() | (high.flatten(1) << 8), (words & 0x8000) != 0, scales)


def _iq1_m(blocks: Tensor) -> Tensor:
    words = _words(blocks, 48, 56, torch.int16)
    bits = ((words & 0xF000) >> torch.tensor((12, 8, 4, 0))).sum(1, keepdim=True)
    d = torch.where(bits >= 0x8000, bits - 0x10000, bits).to(torch.int16).view(torch.float16).float()
    high = _nibbles(blocks[:, 32:48], 1).long()
    scales = d * (2 * ((words[:, :, None] >> torch.tensor((0, 3, 6, 9))) & 7).flatten(1) + 1).float()
    indices = blocks[:, :32].long() | ((high & 7) << 8)
    return _iq1_values(indices, (high & 8) != 0, scales.repeat_interleave(2, dim=1))


_VALUES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
    "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s, "IQ3_XXS": _iq3_xxs, "IQ3_S": _iq3_s, "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}  # fmt: skip
