"""Weights into the layouts of weights.py, a piece of rows at a time, on the device they are packed for.

Plain torch: packing happens once, at the speed of the link to the card; each function is its op of kernels/ops.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from penstock.kernels.quantized import GGUF_LAYOUTS
from penstock.kernels.reference.gguf_blocks import BLOCKS
from penstock.kernels.reference.quantized import rounded_rows
from penstock.kernels.triton.weights import DeviceLinear, DeviceQuantized, device_step, kept_bits, lanes

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.kernels.packed import PackedLinear
    from penstock.kernels.quantized import QuantizedLinear

_SIGN: Final = 128


def pack_into(packed: PackedLinear, first_row: int, source: Tensor) -> None:
    """See Ops.pack_into."""
    assert isinstance(packed, DeviceLinear), type(packed)
    _check_rows(packed, first_row, source)
    packed.data[first_row : first_row + source.shape[0]].copy_(source)


def pack_parts(
    packed: QuantizedLinear, first_row: int, codes_RK: Tensor, scales_RG: Tensor, minimums_RG: Tensor | None = None
) -> None:
    """See Ops.pack_parts."""
    layout = packed.layout
    assert layout.scales != "super", layout
    assert (minimums_RG is None) == (layout.minimums == "none"), layout
    parts = {"scales": scales_RG} if minimums_RG is None else {"scales": scales_RG, "minimums": minimums_RG}
    _write_rows(packed, first_row, codes_RK, parts)


def pack_gguf(packed: QuantizedLinear, first_row: int, blocks_RN: Tensor, ggml_type: int) -> None:
    """See Ops.pack_gguf. The blocks are taken apart on the device."""
    inputs, block_bytes, split = BLOCKS[ggml_type]
    assert packed.layout == GGUF_LAYOUTS[ggml_type], (packed.layout, ggml_type)
    assert blocks_RN.shape[1] * inputs == packed.k * block_bytes, (blocks_RN.shape, packed.k, ggml_type)
    with packed.data.device:
        codes, parts = split(blocks_RN.to(packed.data.device).unflatten(1, (-1, block_bytes)))
    _write_rows(packed, first_row, codes.flatten(1), parts)


def quantize_into(packed: QuantizedLinear, first_row: int, source: Tensor) -> None:
    """See Ops.quantize_into."""
    with packed.data.device:
        codes_RK, scales_RG = rounded_rows(packed.layout, packed.k, source.to(packed.data.device))
    _write_rows(packed, first_row, codes_RK, {"scales": scales_RG})


def _check_rows(packed: PackedLinear | QuantizedLinear, first_row: int, source: Tensor) -> None:
    rows, k = source.shape
    assert k == packed.k, (source.shape, packed.k)
    assert 0 <= first_row <= packed.n - rows, (first_row, rows, packed.n)


def _write_rows(packed: QuantizedLinear, first_row: int, codes_RK: Tensor, parts: dict[str, Tensor]) -> None:
    """codes: uint8, one a byte. parts: "supers" [R, K / 256, 1 or 2], others [R, G]."""
    assert isinstance(packed, DeviceQuantized), type(packed)
    assert codes_RK.dtype is torch.uint8, codes_RK.dtype
    _check_rows(packed, first_row, codes_RK)
    device = packed.data.device
    codes_RK = codes_RK.to(device)
    rows = slice(first_row, first_row + codes_RK.shape[0])
    if packed.kind == "codes":
        _write_fields(packed, rows, codes_RK)
    else:
        codes = (codes_RK ^ _SIGN).view(torch.int8) if packed.kind == "int8" else codes_RK
        packed.codes[rows, : packed.k] = codes
    if packed.kind == "int8":
        packed.scales[rows] = parts["scales"][:, 0].to(device)
        return
    for name, part in parts.items():
        target: Tensor = getattr(packed, name)
        values = part.to(device).movedim(0, -1)
        if name == "supers":
            target[:, : values.shape[0], rows] = values.transpose(0, 1).to(target.dtype)
        else:
            target[: values.shape[0], rows] = values.to(target.dtype)


def _write_fields(packed: DeviceQuantized, rows: slice, codes_RK: Tensor) -> None:
    step, bits, width = device_step(packed.layout), kept_bits(packed.layout), lanes(packed.layout)
    codes_RK = torch.nn.functional.pad(codes_RK, (0, -codes_RK.shape[1] % step))
    if bits == 8:
        packed.codes[:, rows] = _words(codes_RK, step // width, width, 1)
        return
    low_bits = 2 if bits == 2 else 4
    low_fields = 16 // low_bits
    packed.codes[:, rows] = _words(codes_RK & ((1 << low_bits) - 1), low_fields, width, 2)
    if packed.high is not None:
        packed.high[:, rows] = _words(codes_RK >> low_bits, step // width, width, 2)


def _words(codes_RK: Tensor, fields: int, lanes: int, lanes_a_word: int) -> Tensor:
    """Codes -> int32 [steps, R, lanes / lanes_a_word]: field f of a word's lane h from bit (h * fields + f) * width."""
    width = 32 // (fields * lanes_a_word)
    shifts = width * torch.arange(fields * lanes_a_word, dtype=torch.int32, device=codes_RK.device)
    by_field = codes_RK.unflatten(1, (-1, fields, lanes // lanes_a_word, lanes_a_word)).permute(1, 0, 3, 4, 2)
    words: Tensor = (by_field.flatten(3).int() << shifts).sum(3, dtype=torch.int32)
    return words
