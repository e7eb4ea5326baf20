"""A step's tables: gathered on the host, and as the model takes them.

T tokens of R requests, D of which draw; W blocks a row of the block table.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from penstock.layers import AttentionMetadata

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]


class StepTables(NamedTuple):
    """What the model needs for a step, and which rows it came from.

    token_ids: -1 - row stands for the token that row drew last, where the host has not heard of it yet.
    """

    token_ids: Int64  # [T]
    positions: Int64  # [T]
    slot_mapping: Int64  # [T]
    query_starts: Int32  # [R + 1]
    context_lens: Int32  # [R]
    block_tables: Int32  # [R, W]
    token_types: Int64 | None  # [T]
    rows: Int64  # [R] the requests' rows
    last_tokens: Int64  # [R] index in [0, T) of each request's last token in this step


class DrawTables(NamedTuple):
    """Who draws, and how. uniform: in [0, 1), read for rows with temperature above 0 only."""

    rows: Int64  # [D]
    sources: Int64  # [D] of what the model gave, the row that each draws from: a token's, or in a replay a request's
    temperature: NDArray[np.float32]  # [D]
    top_k: Int32  # [D]
    top_p: NDArray[np.float32]  # [D]
    min_p: NDArray[np.float32]  # [D]
    uniform: NDArray[np.float64]  # [D]


class DrawInputs(NamedTuple):
    """DrawTables on the device."""

    rows: Tensor
    sources: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor


class StepInputs(NamedTuple):
    """StepTables on the device."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    metadata: AttentionMetadata
    last_tokens: Tensor  # [R] int64
    draw: DrawInputs | None
