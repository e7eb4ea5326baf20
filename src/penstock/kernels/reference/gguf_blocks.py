"""GGUF's blocks taken apart in torch: codes one a byte, and the scales as they are stored.

The formats are those of llama.cpp's ggml-common.h. Shapes: R rows, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch

from penstock.kernels import quantized
from penstock.kernels.reference.quantized import split_dim, write_rows

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.kernels.quantized import QuantizedLinear

Parts = dict[str, "Tensor"]


def _fields(blocks_RBN: Tensor, *sizes: int) -> list[Tensor]:
    return list(torch.split(blocks_RBN, list(sizes), dim=2))


def _half(field_RB2: Tensor) -> Tensor:
    """Two bytes -> float32 [R, B, 1]."""
    return field_RB2.contiguous().view(torch.float16).float()


def _spread(field: Tensor, width: int, bits: int) -> Tensor:
    """Bytes [R, B, N] in runs of `width`: each run gives its lower bits, then the next ..., -> [R, B, N * 8 / bits]."""
    runs = split_dim(field, 2, -1, 1, width)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).view(-1, 1)
    return ((runs >> shifts) & ((1 << bits) - 1)).flatten(2)


def _bits_of_words(field_RB4: Tensor) -> Tensor:
    """Four bytes -> their 32 bits, the lowest first."""
    return ((field_RB4[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(2)


def _simple(code_bits: int, minimums: bool) -> Callable[[Tensor], tuple[Tensor, Parts]]:
    """Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL: blocks of 32."""

    def split(blocks: Tensor) -> tuple[Tensor, Parts]:
        d, m, high, low = _fields(blocks, 2, 2 * minimums, 4 * (code_bits == 5), 16)
        codes = _spread(low, 16, 4)
        if code_bits == 5:
            codes = codes | (_bits_of_words(high) << 4)
        parts = {"scales": _half(d).flatten(1)}
        if minimums:
            parts["minimums"] = _half(m).flatten(1)
        return codes, parts

    return split


def _q8_0(blocks: Tensor) -> tuple[Tensor, Parts]:
    d, codes = _fields(blocks, 2, 32)
    return codes ^ 128, {"scales": _half(d).flatten(1)}


def _mxfp4(blocks: Tensor) -> tuple[Tensor, Parts]:
    exponent, low = _fields(blocks, 1, 16)
    # Half of 2^(e - 127), whose two smallest are subnormal.
    wide = exponent.int()
    bits = torch.where(wide < 2, 0x00200000 << wide.clamp(max=1), (wide - 1) << 23)
    return _spread(low, 16, 4), {"scales": bits.view(torch.float32).flatten(1)}


def _scales_and_minimums(field_RB12: Tensor) -> tuple[Tensor, Tensor]:
    """The 6-bit scales and minimums of Q4_K and Q5_K."""
    first, second, third = torch.split(field_RB12, 4, dim=2)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=2)
    minimums = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=2)
    return scales, minimums


def _with_minimums(d: Tensor, dmin: Tensor, scales: Tensor, minimums: Tensor) -> Parts:
    supers = torch.cat([_half(d), -_half(dmin)], dim=2)
    return {"supers": supers, "scales": scales.flatten(1).float(), "minimums": minimums.flatten(1).float()}


def _q4_k(blocks: Tensor) -> tuple[Tensor, Parts]:
    d, dmin, scales, low = _fields(blocks, 2, 2, 12, 128)
    return _spread(low, 32, 4), _with_minimums(d, dmin, *_scales_and_minimums(scales))


def _q5_k(blocks: Tensor) -> tuple[Tensor, Parts]:
    d, dmin, scales, high, low = _fields(blocks, 2, 2, 12, 32, 128)
    codes = _spread(low, 32, 4) | (_spread(high, 32, 1) << 4)
    return codes, _with_minimums(d, dmin, *_scales_and_minimums(scales))


def _q2_k(blocks: Tensor) -> tuple[Tensor, Parts]:
    scales, low, d, dmin = _fields(blocks, 16, 64, 2, 2)
    return _spread(low, 32, 2), _with_minimums(d, dmin, scales & 15, scales >> 4)


def _q3_k(blocks: Tensor) -> tuple[Tensor, Parts]:
    high, low, scales, d = _fields(blocks, 32, 64, 12, 2)
    signed = (_spread(scales[..., :8], 8, 4) | (_spread(scales[..., 8:], 4, 2) << 4)).float() - 32
    return _spread(low, 32, 2) | (_spread(high, 32, 1) << 2), {"supers": _half(d), "scales": signed.flatten(1)}


def _q6_k(blocks: Tensor) -> tuple[Tensor, Parts]:
    low, high, scales, d = _fields(blocks, 128, 64, 16, 2)
    codes = _spread(low, 64, 4) | (_spread(high, 32, 2) << 4)
    return codes, {"supers": _half(d), "scales": scales.view(torch.int8).flatten(1).float()}


def _iq4_xs(blocks: Tensor) -> tuple[Tensor, Parts]:
    d, high, scales, low = _fields(blocks, 2, 2, 4, 128)
    upper = ((high[..., None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)) & 3).flatten(2)
    signed = (_spread(scales, 1, 4) | (upper << 4)).float() - 32
    return _spread(low, 16, 4), {"supers": _half(d), "scales": signed.flatten(1)}


# Of each type: the inputs and the bytes of a block, and how it is taken apart.
BLOCKS: Final = {
    quantized.Q4_0: (32, 18, _simple(4, minimums=False)),
    quantized.Q4_1: (32, 20, _simple(4, minimums=True)),
    quantized.Q5_0: (32, 22, _simple(5, minimums=False)),
    quantized.Q5_1: (32, 24, _simple(5, minimums=True)),
    quantized.Q8_0: (32, 34, _q8_0),
    quantized.Q2_K: (256, 84, _q2_k),
    quantized.Q3_K: (256, 110, _q3_k),
    quantized.Q4_K: (256, 144, _q4_k),
    quantized.Q5_K: (256, 176, _q5_k),
    quantized.Q6_K: (256, 210, _q6_k),
    quantized.IQ4_NL: (32, 18, _simple(4, minimums=False)),
    quantized.IQ4_XS: (256, 136, _iq4_xs),
    quantized.MXFP4: (32, 17, _mxfp4),
}


def pack_gguf(packed: QuantizedLinear, first_row: int, blocks_RN: Tensor, ggml_type: int) -> None:
    """See Ops.pack_gguf."""
    inputs, block_bytes, split = BLOCKS[ggml_type]
    assert packed.layout == quantized.GGUF_LAYOUTS[ggml_type], (packed.layout, ggml_type)
    assert blocks_RN.shape[1] * inputs == packed.k * block_bytes, (blocks_RN.shape, packed.k, ggml_type)
    codes, parts = split(split_dim(blocks_RN, 1, -1, block_bytes))
    write_rows(packed, first_row, codes.flatten(1), parts)
