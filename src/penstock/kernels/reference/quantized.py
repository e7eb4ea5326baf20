"""Quantised linears in torch: packing, unpacking and multiplying the layouts of kernels/quantized.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from penstock.kernels.packed import TILE_COLUMNS
from penstock.kernels.quantized import INT4, SCALE_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.kernels.quantized import QuantizedLinear, WeightLayout

# Tables of llama.cpp (IQ4_NL), of the OCP microscaling formats (doubled, as GGUF's scales expect) and of QLoRA.
TABLES: Final = {
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "mxfp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
}  # fmt: skip
_FP8: Final = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _planes(layout: WeightLayout) -> list[tuple[int, int]]:
    """(lowest bit, bits) of each plane of an "int8" layout."""
    return {8: [(0, 8)], 6: [(0, 4), (4, 2)], 5: [(0, 4), (4, 1)], 4: [(0, 4)], 3: [(0, 2), (2, 1)], 2: [(0, 2)]}[
        layout.bits
    ]


def _plane_views(packed: QuantizedLinear) -> list[tuple[int, int, Tensor]]:
    """(lowest bit, bits, view [tiles, steps, chunks, vectors, 16, 4]) of each plane of an "int8" layout.

    A chunk is one vector of the last plane, behind those of the other with the same units.
    """
    layout, planes, first = packed.layout, [], 0
    last_bits = _planes(layout)[-1][1]
    codes = packed.steps()[..., layout.header_bytes :]
    chunks = split_dim(codes, 2, -1, layout.bits // last_bits, TILE_COLUMNS, 4)
    for low, bits in _planes(layout):
        planes.append((low, bits, chunks[:, :, :, first : first + bits // last_bits]))
        first += bits // last_bits
    return planes


def split_dim(x: Tensor, dim: int, *sizes: int) -> Tensor:
    """A view of x whose dimension `dim` is several of `sizes` (one may be -1)."""
    return x.view(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def values_of(layout: WeightLayout, dtype: torch.dtype) -> Tensor:
    """What each code means, float32 [2 ** bits]. dtype: of the activations; a table is rounded to it."""
    codes = torch.arange(1 << layout.bits)
    if layout.values in _FP8:
        return codes.to(torch.uint8).view(_FP8[layout.values]).float()
    if layout.values in TABLES:
        table = torch.tensor(TABLES[layout.values], dtype=torch.float32)
        return table.to(dtype).float() if layout.activations == "float" else table
    return (codes - layout.offset).float()


# ---- codes


def _vectors(packed: QuantizedLinear, begin: int, vectors: int, width: int) -> Tensor:
    """A view [tiles, steps, vectors, 16, width] of the planes from byte `begin` of each step."""
    steps = packed.steps()
    return split_dim(steps[..., begin : begin + vectors * TILE_COLUMNS * width], 2, vectors, TILE_COLUMNS, width)


def _float_words(packed: QuantizedLinear) -> Tensor:
    return _vectors(packed, packed.layout.header_bytes, packed.layout.step // 8, 4)


def _write_codes(packed: QuantizedLinear, rows_R: Tensor, codes_RSK: Tensor) -> None:
    layout = packed.layout
    tile, column, begin = rows_R // TILE_COLUMNS, rows_R % TILE_COLUMNS, layout.header_bytes
    if layout.activations == "float" and layout.bits == 8:
        _vectors(packed, begin, layout.step // 2, 2)[tile, :, :, column] = split_dim(codes_RSK, 2, -1, 2)
        return
    if layout.activations == "float":
        # [.., vector, unit of the vector, input of the unit] -> two bytes of each input's word
        units = split_dim(codes_RSK, 2, -1, 2, 2, 2)
        words = (units[..., 0, :] | (units[..., 1, :] << 4)).transpose(-1, -2).flatten(-2)
        _float_words(packed)[tile, :, :, column] = words
        return
    for low, bits, view in _plane_views(packed):
        per_byte = 8 // bits
        units = split_dim((codes_RSK >> low) & ((1 << bits) - 1), 2, -1, per_byte, 4)
        plane = sum((units[..., j, :] << (j * bits) for j in range(1, per_byte)), units[..., 0, :])
        view[tile, :, :, :, column] = split_dim(plane, 2, *view.shape[2:4])


def _read_codes(packed: QuantizedLinear) -> Tensor:
    """[tiles, steps, 16, step] int64"""
    layout = packed.layout
    begin = layout.header_bytes
    if layout.activations == "float" and layout.bits == 8:
        return _vectors(packed, begin, layout.step // 2, 2).transpose(2, 3).flatten(3).long()
    if layout.activations == "float":
        words = split_dim(_float_words(packed).transpose(2, 3), 4, 2, 2).transpose(-1, -2)
        return torch.stack([words & 15, words >> 4], dim=-2).flatten(3).long()
    shape = (packed.num_tiles, packed.num_steps, TILE_COLUMNS, layout.step)
    codes = torch.zeros(shape, dtype=torch.int64, device=packed.data.device)
    for low, bits, view in _plane_views(packed):
        plane = view.flatten(2, 3).transpose(2, 3).long()
        units = torch.stack([(plane >> (j * bits)) & ((1 << bits) - 1) for j in range(8 // bits)], dim=4)
        codes |= units.flatten(3) << low
    return codes


# ---- headers


def _header(packed: QuantizedLinear) -> dict[str, Tensor]:
    """Views of a header's parts, each [tiles, steps, its groups, 16]."""
    layout, parts, begin = packed.layout, {}, 0
    dtype = torch.int8 if layout.scales == "super" else SCALE_DTYPES[layout.scales]
    minimum_dtype = torch.uint8 if layout.minimums == "point" else dtype
    for name, groups, part_dtype in (
        ("supers", layout.num_supers, torch.float16),
        ("scales", layout.groups_per_step, dtype),
        ("minimums", layout.groups_per_step if layout.minimums != "none" else 0, minimum_dtype),
    ):
        nbytes = groups * TILE_COLUMNS * part_dtype.itemsize
        part = packed.steps()[..., begin : begin + nbytes].view(part_dtype)
        parts[name] = split_dim(part, 2, groups, TILE_COLUMNS) if groups else part
        begin += nbytes
    return parts


def _pad(x: Tensor, multiple: int, value: float = 0) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[1] % multiple), value=value)


def write_rows(packed: QuantizedLinear, first_row: int, codes_RK: Tensor, parts: dict[str, Tensor]) -> None:
    """Pack rows of codes (uint8, one a byte) and of a header's parts: "supers" [R, K / 256, 1 or 2], others [R, G]."""
    layout = packed.layout
    rows = codes_RK.shape[0]
    assert codes_RK.dtype is torch.uint8, codes_RK.dtype
    assert codes_RK.shape[1] == packed.k, (codes_RK.shape, packed.k)
    assert 0 <= first_row <= packed.n - rows, (first_row, rows, packed.n)
    device = packed.data.device
    row = torch.arange(first_row, first_row + rows, device=device)
    _write_codes(packed, row, split_dim(_pad(codes_RK.to(device), layout.step), 1, -1, layout.step))
    if not layout.group_size:
        packed.row_scales()[first_row : first_row + rows] = parts["scales"][:, 0].to(device)
        return
    header = _header(packed)
    for name, part in ((name, part.to(device)) for name, part in parts.items()):
        per_step = header[name].shape[2]
        values = part if name == "supers" else split_dim(_pad(part, per_step), 1, -1, per_step)
        header[name][row // TILE_COLUMNS, :, :, row % TILE_COLUMNS] = values.to(header[name].dtype)


def pack_parts(
    packed: QuantizedLinear, first_row: int, codes_RK: Tensor, scales_RG: Tensor, minimums_RG: Tensor | None = None
) -> None:
    """See Ops.pack_parts."""
    assert packed.layout.scales != "super", packed.layout
    assert (minimums_RG is None) == (packed.layout.minimums == "none"), packed.layout
    parts = {"scales": scales_RG} if minimums_RG is None else {"scales": scales_RG, "minimums": minimums_RG}
    write_rows(packed, first_row, codes_RK, parts)


def dequantize(packed: QuantizedLinear, first_row: int = 0, rows: int | None = None) -> Tensor:
    """See Ops.dequantize."""
    layout = packed.layout
    values = values_of(layout, packed.dtype).to(packed.data.device)[_read_codes(packed)]
    if not layout.group_size:
        values = values * packed.row_scales().view(-1, 1, TILE_COLUMNS, 1)
    else:
        header = _header(packed)
        by_column = {name: part.float().transpose(2, 3)[..., None] for name, part in header.items() if part.shape[2]}
        scales, minimums = by_column["scales"], by_column.get("minimums")
        if layout.scales == "super":
            supers = by_column["supers"]
            scales = supers[:, :, :, :1] * scales
            minimums = supers[:, :, :, 1:] * minimums if minimums is not None else None
        if layout.minimums == "point":
            assert minimums is not None
            minimums = -scales * minimums
        groups = split_dim(values, 3, layout.groups_per_step, layout.group_size) * scales
        values = (groups if minimums is None else groups + minimums).flatten(3)
    all_rows = values.transpose(1, 2).flatten(2).flatten(0, 1)
    end = packed.n if rows is None else first_row + rows
    return all_rows[first_row:end, : packed.k].contiguous()


# ---- multiplication


def quantize_activations(x_TK: Tensor, x_block: int) -> Tensor:
    """x rounded to 255 levels of its largest magnitude, per token and `x_block` inputs (0: all) -> float32 [T, K].

    Where that is not finite, all of the block is NaN.
    """
    tokens, k = x_TK.shape
    block = x_block or k
    blocks = split_dim(_pad(x_TK.float(), block), 1, -1, block)
    most = blocks.abs().amax(2, keepdim=True)
    codes = (blocks * torch.where(most >= 1e-30, torch.full_like(most, 127.0) / most, 0.0)).round()
    scaled = codes * torch.where(most >= 1e-30, most / 127.0, 0.0)
    return torch.where(most.isfinite(), scaled, torch.nan).reshape(tokens, -1)[:, :k]


def sum_dtype(x: Tensor) -> torch.dtype:
    """Of products' sums: the widest that x's device is sure to have."""
    return torch.float64 if x.is_cpu or x.is_cuda else torch.float32


def linear(
    x_TK: Tensor, weight: QuantizedLinear, bias_N: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """See Ops.linear."""
    x = x_TK.float() if weight.layout.activations == "float" else quantize_activations(x_TK, weight.layout.x_block)
    wide = sum_dtype(x)
    out_TN = (x.to(wide) @ dequantize(weight).to(wide).T).float()
    if bias_N is not None:
        out_TN += bias_N.float()
    return out_TN.to(x_TK.dtype if out_dtype is None else out_dtype)


def embedding(ids_T: Tensor, weight: QuantizedLinear) -> Tensor:
    """See Ops.embedding."""
    return dequantize(weight)[ids_T].to(weight.dtype)


# ---- rounding


def rounded_rows(layout: WeightLayout, k: int, source: Tensor) -> tuple[Tensor, Tensor]:
    """Float rows [R, K] as codes (uint8 [R, K]) and a scale a group (float32 [R, G]); see Ops.quantize_into."""
    assert layout.values == "integer" and layout.minimums == "none" and layout.scales != "super", layout
    group = layout.group_size or k
    groups = split_dim(_pad(source.float(), group), 1, -1, group)
    if layout.bits == INT4.bits:
        # The largest magnitude becomes -8: the codes have one more level on that side (llama.cpp's rule).
        most = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        scales = most / -layout.offset
    else:
        scales = groups.abs().amax(2, keepdim=True) / (layout.offset - 1)
    scaled = groups * torch.where(scales != 0, 1.0 / scales, 0.0)
    # Rounded as llama.cpp does: in 4 bits behind the offset, halves upwards; in 8 away from zero.
    if layout.bits == INT4.bits:
        codes = (scaled + (layout.offset + 0.5)).floor()
    else:
        codes = (scaled.abs() + 0.5).floor().copysign(scaled) + layout.offset
    return codes.clamp(0, 2 * layout.offset - 1).flatten(1)[:, :k].to(torch.uint8), scales[..., 0]


def quantize_into(packed: QuantizedLinear, first_row: int, source: Tensor) -> None:
    """See Ops.quantize_into."""
    codes_RK, scales_RG = rounded_rows(packed.layout, packed.k, source)
    write_rows(packed, first_row, codes_RK, {"scales": scales_RG})
