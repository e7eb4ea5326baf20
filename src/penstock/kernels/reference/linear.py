"""Linear layers over packed weights, and the embedding gathered out of them, in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from penstock.kernels.packed import TILE_COLUMNS
from penstock.kernels.quantized import QuantizedLinear
from penstock.kernels.reference import quantized

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.kernels.packed import PackedLinear


def unpack(weight: PackedLinear) -> Tensor:
    """The plain [N, K] of a packed weight."""
    rows = weight.tiles().transpose(1, 2).reshape(weight.n_padded, weight.k_padded)
    return rows[: weight.n, : weight.k]


def pack_into(packed: PackedLinear, first_row: int, source: Tensor) -> None:
    """See Ops.pack_into."""
    rows, k = source.shape
    assert k == packed.k, (source.shape, packed.k)
    assert 0 <= first_row <= packed.n - rows, (first_row, rows, packed.n)
    padded = torch.zeros((rows, packed.k_padded), dtype=packed.dtype)
    padded[:, :k] = source
    tiles = packed.tiles()
    row = torch.arange(first_row, first_row + rows, device=tiles.device)
    padded_rows = padded.view(rows, tiles.shape[1], tiles.shape[3]).to(tiles.device)
    tiles[row // TILE_COLUMNS, :, row % TILE_COLUMNS] = padded_rows


def linear(
    x_TK: Tensor,
    weight: PackedLinear | QuantizedLinear,
    bias_N: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See Ops.linear."""
    if isinstance(weight, QuantizedLinear):
        return quantized.linear(x_TK, weight, bias_N, out_dtype)
    out_TN = x_TK.float() @ unpack(weight).float().T
    if bias_N is not None:
        out_TN += bias_N.float()
    return out_TN.to(x_TK.dtype if out_dtype is None else out_dtype)


def embedding(ids_T: Tensor, weight: PackedLinear | QuantizedLinear) -> Tensor:
    """See Ops.embedding."""
    if isinstance(weight, QuantizedLinear):
        return quantized.embedding(ids_T, weight)
    rows = weight.tiles()[ids_T // TILE_COLUMNS, :, ids_T % TILE_COLUMNS]
    return rows.reshape(ids_T.shape[0], weight.k_padded)[:, : weight.k].contiguous()
