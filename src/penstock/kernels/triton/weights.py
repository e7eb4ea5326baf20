"""Linear weights as the GPU kernels read them. One flat buffer of bytes a weight, and views of its parts.

Three kinds, chosen by what the codes are and what the card multiplies:
  "fp8"    e4m3 codes uint8 [N, K padded to 128], scales [groups, N]: multiplied with activations in e4m3 (from sm_89)
  "int8"   codes int8 [N, K padded to 128], scales float32 [N]: multiplied with activations in int8
  "codes"  fields of 2, 4, 6 or 8 bits, made bfloat16 in registers and multiplied with bfloat16 activations

Kind "codes": inputs come in steps of F fields of P lanes (P = 32, or 16 for groups of 16): input f * P + l of a step is
field f of lane l, so each field is a tile [N, P] of one group of inputs, taken out by one shift. Of a step, an output's
words lie side by side (64 bytes at P = 32) and the outputs beside each other: a tile's load is one run of memory.
  2 bits   F = 8   int32 [steps, N, P / 2]: bits 16 h + 2 f of word c are lane 2 c + h
  4 bits   F = 4   int32 [steps, N, P / 2]: bits 16 h + 4 f
  6 bits   F = 8   lower four bits as 4 bits are (two words a step), upper two as 2 bits are
  8 bits   F = 4   int32 [steps, N, P]: byte f of word l
Codes of 3 bits are kept in 4, those of 5 in 6. Scales, and minimums or points, are [groups, N] in their stored type;
"super": int8 [groups, N] times float16 [1 or 2, K / 256, N]. A mixture's experts stand below each other in N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from penstock.kernels.packed import PackedLinear
from penstock.kernels.quantized import SCALE_DTYPES, SUPER_GROUP, QuantizedLinear, WeightLayout

DENSE_STEP: Final = 128
_ALIGNMENT: Final = 256
MIN_FP8_CAPABILITY: Final = 89
# Bits of a code in the layout -> bits kept.
_KEPT_BITS: Final = {2: 2, 3: 4, 4: 4, 5: 6, 6: 6, 8: 8}
_FIELDS: Final = {2: 8, 4: 4, 6: 8, 8: 4}


@dataclass(frozen=True, slots=True)
class DeviceLinear(PackedLinear):
    """A weight [n, k] as it is: `data` is [n, k] of `dtype`."""


@dataclass(frozen=True, slots=True)
class DeviceQuantized(QuantizedLinear):
    """A quantised weight [n, k]. kind: "fp8", "int8" or "codes". The parts are views of `data`, None if not kept."""

    kind: str
    codes: Tensor
    high: Tensor | None
    scales: Tensor
    minimums: Tensor | None
    supers: Tensor | None

    @property
    def activations(self) -> str:
        return {"fp8": "e4m3", "int8": "int8", "codes": "bfloat16"}[self.kind]


def kept_bits(layout: WeightLayout) -> int:
    """Of a code of kind "codes"."""
    return _KEPT_BITS[layout.bits]


def lanes(layout: WeightLayout) -> int:
    """Inputs of one field."""
    return 16 if layout.group_size == 16 else 32


def device_step(layout: WeightLayout) -> int:
    """Inputs of a step of kind "codes"."""
    return _FIELDS[_KEPT_BITS[layout.bits]] * lanes(layout)


def kind_of(layout: WeightLayout, capability: int) -> str:
    """How a layout is multiplied on a card of a compute capability, as 80 or 90."""
    if layout.group_size == 0:
        return "int8"
    is_fp8 = layout.values == "e4m3" and layout.group_size % DENSE_STEP == 0
    return "fp8" if is_fp8 and capability >= MIN_FP8_CAPABILITY else "codes"


def empty_linear(n: int, k: int, dtype: torch.dtype, device: torch.device | str) -> DeviceLinear:
    """An unfilled weight of floats."""
    assert n > 0, n
    assert k > 0, k
    return DeviceLinear(torch.empty((n, k), dtype=dtype, device=device), n, k, dtype)


def linear_nbytes(n: int, k: int, dtype: torch.dtype) -> int:
    """Bytes that a weight of floats takes."""
    return n * k * dtype.itemsize


def quantized_nbytes(n: int, k: int, layout: WeightLayout, capability: int = 90) -> int:
    """Bytes that a quantised [n, k] takes."""
    return sum(
        _rounded(_nbytes(part), _ALIGNMENT) for part in _parts(n, k, layout, kind_of(layout, capability)).values()
    )


def empty_quantized(
    n: int, k: int, layout: WeightLayout, dtype: torch.dtype, device: torch.device | str, capability: int = 90
) -> DeviceQuantized:
    """A quantised weight of zeros. dtype: of the activations (bfloat16 or float32)."""
    assert n > 0, n
    assert k > 0, k
    nbytes = quantized_nbytes(n, k, layout, capability)
    data = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    return from_bytes(data, n, k, layout, dtype, kind_of(layout, capability))


def from_bytes(data: Tensor, n: int, k: int, layout: WeightLayout, dtype: torch.dtype, kind: str) -> DeviceQuantized:
    """A weight over the bytes of one that was packed before."""
    views: dict[str, Tensor] = {}
    begin = 0
    for name, (shape, part_dtype) in _parts(n, k, layout, kind).items():
        nbytes = _nbytes((shape, part_dtype))
        views[name] = data[begin : begin + nbytes].view(part_dtype).view(shape)
        begin += _rounded(nbytes, _ALIGNMENT)
    assert begin == data.numel(), (begin, data.numel())
    optional = [views.get(name) for name in ("minimums", "supers")]
    return DeviceQuantized(
        data, n, k, layout, dtype, kind, views["codes"], views.get("high"), views["scales"], *optional
    )


_Part = tuple[tuple[int, ...], torch.dtype]


def _parts(n: int, k: int, layout: WeightLayout, kind: str) -> dict[str, _Part]:
    """Shape and type of each part, in the order in which they lie."""
    if kind == "int8":
        return {"codes": ((n, _rounded(k, DENSE_STEP)), torch.int8), "scales": ((n,), torch.float32)}
    scale_dtype = torch.int8 if layout.scales == "super" else SCALE_DTYPES[layout.scales]
    if kind == "fp8":
        groups = -(-k // layout.group_size)
        return {"codes": ((n, _rounded(k, DENSE_STEP)), torch.uint8), "scales": ((groups, n), scale_dtype)}
    step, bits, width = device_step(layout), _KEPT_BITS[layout.bits], lanes(layout)
    steps = -(-k // step)
    groups = -(-steps * step // layout.group_size)
    words = (steps * (2 if bits == 6 else 1), n, width if bits == 8 else width // 2)
    parts: dict[str, _Part] = {"codes": (words, torch.int32)}
    if bits == 6:
        parts["high"] = ((steps, n, width // 2), torch.int32)
    parts["scales"] = ((groups, n), scale_dtype)
    if layout.minimums != "none":
        parts["minimums"] = ((groups, n), torch.uint8 if layout.minimums == "point" else scale_dtype)
    if layout.scales == "super":
        parts["supers"] = ((layout.num_supers, -(-steps * step // SUPER_GROUP), n), torch.float16)
    return parts


def _nbytes(part: _Part) -> int:
    return torch.Size(part[0]).numel() * part[1].itemsize


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
