"""Linears rounded to the nearest code, a piece of rows at a time, as compressed-tensors stores them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from penstock.conversion.planned_file import Section
from penstock.conversion.safetensors_output import Entry, plain
from penstock.conversion.source_rows import SourceRows


def w8a8(name: str, rows: SourceRows) -> list[Entry]:
    """Symmetric int8 with a scale an output: q = round(w / scale), scale = the largest magnitude / 127."""
    count, columns = rows.shape(name)

    def scale_of(piece: Tensor) -> Tensor:
        return (piece.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)

    def codes() -> Iterator[bytes]:
        for piece in rows.pieces(name):
            yield (piece.float() / scale_of(piece)).round().clamp(-127, 127).to(torch.int8).numpy().tobytes()

    def scales() -> Iterator[bytes]:
        for piece in rows.pieces(name):
            yield scale_of(piece).numpy().tobytes()

    return [
        Entry(name, "I8", (count, columns), Section(count * columns, codes)),
        Entry(f"{name}_scale", "F32", (count, 1), Section(4 * count, scales)),
    ]


def w4a16(name: str, rows: SourceRows, group_size: int) -> list[Entry]:
    """Symmetric int4 by groups: q = round(w / scale) in -8 to 7, packed eight to a word as q + 8."""
    count, columns = rows.shape(name)
    if columns % group_size:
        return [plain(name, rows)]
    groups = columns // group_size

    def scale_of(piece: Tensor) -> Tensor:
        """[R, G, 1], rounded to what is stored."""
        by_group = piece.float().view(-1, groups, group_size)
        return (by_group.abs().amax(2, keepdim=True) / 7.5).clamp(min=1e-7).half().float()

    def codes() -> Iterator[bytes]:
        for piece in rows.pieces(name):
            scaled = piece.float().view(-1, groups, group_size) / scale_of(piece)
            nibbles = (scaled.round().clamp(-8, 7) + 8).to(torch.uint8).view(-1, columns // 2, 2)
            yield (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).numpy().tobytes()

    def scales() -> Iterator[bytes]:
        for piece in rows.pieces(name):
            yield scale_of(piece).half().numpy().tobytes()

    stem = name.removesuffix(".weight")
    shape = np.array([count, columns], np.int64).tobytes()
    return [
        Entry(f"{stem}.weight_packed", "I32", (count, columns // 8), Section(count * columns // 2, codes)),
        Entry(f"{stem}.weight_scale", "F16", (count, groups), Section(2 * count * groups, scales)),
        Entry(f"{stem}.weight_shape", "I64", (2,), Section(16, lambda: [shape])),
    ]
