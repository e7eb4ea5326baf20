"""Draws on a device that works by itself: nothing here waits for it, but for the rows with host filters.

The order is the sampler's, the arithmetic on an edited logit that of logit_edits and penalties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.sampling.logit_edits import TokenPenalties
from penstock.sampling.sampler import RowEdits, SamplingBatch

# Tokens of all rows that are penalised at once, however long the contexts are, and bytes that one takes on the device.
MOST_PENALISED: Final = 1 << 20
PENALISED_NBYTES: Final = 80

Send = Callable[[NDArray[np.generic]], Tensor]


class DeferredDraw(NamedTuple):
    """ids: [R], -1 where a row's logits hold no usable number.

    logprobs: what Ops.top_logprobs gives for the rows that want them, of `raw_logits`, their logits before any edit.
    """

    ids: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor, Tensor] | None
    raw_logits: Tensor | None


def draw(logits_RV: Tensor, batch: SamplingBatch, ops: Ops, send: Send) -> DeferredDraw:
    """Edits logits [R, V] float32 in place. send: host arrays to the device."""
    raw_LV, wanted_L = None, None
    if batch.logprobs:
        wanted_L = send(np.array([row for row, _ in batch.logprobs], dtype=np.int64))
        raw_LV = logits_RV.index_select(0, wanted_L)
    if batch.masks is not None:
        ops.mask_logits(logits_RV, *batch.masks)
    if batch.edits:
        _apply_edits(logits_RV, batch.edits, ops, send)
    for row, filters, token_ids, position in batch.filtered:
        edited_V = logits_RV[row].cpu().numpy()
        batch.temperature[row] = filters.apply(edited_V, token_ids, position)
        logits_RV[row] = send(edited_V)
    ids_R = ops.sample(logits_RV, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.uniform)
    if raw_LV is None or wanted_L is None:
        return DeferredDraw(ids_R, None, None)
    most = min(max(count for _, count in batch.logprobs), logits_RV.shape[1])
    chosen_L = ids_R.index_select(0, wanted_L).clamp_(min=0)
    return DeferredDraw(ids_R, ops.top_logprobs(raw_LV, chosen_L, most), raw_LV)


def _apply_edits(logits_RV: Tensor, edits: Sequence[RowEdits], ops: Ops, send: Send) -> None:
    """All rows' edits at once, each as an array of (row, token) pairs."""
    biased = [(row, *edit.bias) for row, edit, _ in edits if len(edit.bias[0])]
    if biased:
        places = _pairs([(row, ids) for row, ids, _ in biased], send)
        logits_RV[places] += send(np.concatenate([values for *_, values in biased]))
    excluded = [(row, edit.excluded(output_ids)) for row, edit, output_ids in edits]
    if any(len(ids) for _, ids in excluded):
        logits_RV[_pairs(excluded, send)] = -torch.inf
    piece: list[tuple[int, TokenPenalties]] = []
    for row, edit, _ in edits:
        if edit.penalties is not None:
            if sum(len(each.ids) for _, each in piece) + len(edit.penalties.ids) > MOST_PENALISED:
                _penalise(logits_RV, piece, ops, send)
                piece = []
            piece.append((row, edit.penalties))
    _penalise(logits_RV, piece, ops, send)


def _penalise(logits_RV: Tensor, penalised: Sequence[tuple[int, TokenPenalties]], ops: Ops, send: Send) -> None:
    if not penalised:
        return
    rows_N, ids_N = _pairs([(row, penalties.ids) for row, penalties in penalised], send)
    counts_N = send(np.concatenate([penalties.counts for _, penalties in penalised]))
    penalties_R3 = np.zeros((len(logits_RV), 3), dtype=np.float32)
    for row, each in penalised:
        penalties_R3[row] = each.repetition, each.frequency, each.presence
    ops.apply_penalties(logits_RV, rows_N, ids_N, counts_N, send(penalties_R3))


def _pairs(entries: Sequence[tuple[int, NDArray[np.int64]]], send: Send) -> tuple[Tensor, Tensor]:
    """(rows, token ids), one entry for each token of each row."""
    rows = np.concatenate([np.full(len(ids), row, dtype=np.int64) for row, ids in entries])
    return send(rows), send(np.concatenate([ids for _, ids in entries]))
