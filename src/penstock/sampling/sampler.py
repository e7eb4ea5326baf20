"""Draws one token for each row. Rows do not influence one another.

Order: grammar mask, edits (see logit_edits), filters (see row_filters), temperature, top-k, top-p, min-p, then the
inverse of the distribution function at a uniform number of (seed, output position).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.messages import TokenLogprobs
from penstock.sampling.logit_edits import LogitEdits
from penstock.sampling.logprobs import token_logprobs
from penstock.sampling.row_filters import RowFilters

NO_TOKEN: Final = -1


class RowEdits(NamedTuple):
    """A row whose logits are edited. output_ids: the request's output so far."""

    row: int
    edits: LogitEdits
    output_ids: NDArray[np.int64]


class FilteredRow(NamedTuple):
    """A row with further samplers. token_ids: prompt and output so far. position: of the draw in the output."""

    row: int
    filters: RowFilters
    token_ids: NDArray[np.int64]
    position: int


class SamplingBatch(NamedTuple):
    """Parameters of R rows.

    uniform: in [0, 1), read for rows with temperature above 0 only.
    logprobs: (row, how many alternatives) of the rows that want log-probabilities.
    masks: (rows that obey a grammar, their masks [K, words] int32): bit i % 32 of word i // 32 allows token i.
    """

    temperature: Tensor  # [R] float32
    top_k: Tensor  # [R] int32
    top_p: Tensor  # [R] float32
    min_p: Tensor  # [R] float32
    uniform: Tensor  # [R] float64
    edits: Sequence[RowEdits] = ()
    logprobs: Sequence[tuple[int, int]] = ()
    masks: tuple[Sequence[int], NDArray[np.int32]] | None = None
    filtered: Sequence[FilteredRow] = ()


def sample(
    logits_RV: Tensor, batch: SamplingBatch, ops: Ops, settle: Callable[[list[int]], list[int]] | None = None
) -> tuple[list[int], dict[int, TokenLogprobs]]:
    """Token ids of the rows and log-probabilities by row. NO_TOKEN: the row's logits hold no usable number.

    Edits logits [R, V] float32 in place. settle: may put other tokens in the place of those drawn.
    """
    wanted = [row for row, _ in batch.logprobs]
    # Log-probabilities are of the raw logits, the draw is of the edited ones.
    raw_LV = logits_RV[wanted] if wanted else None
    if batch.masks is not None:
        ops.mask_logits(logits_RV, *batch.masks)
    if batch.edits:
        editable_RV = logits_RV.numpy()
        for row, edits, output_ids in batch.edits:
            edits.apply(editable_RV[row], output_ids)
    for row, filters, token_ids, position in batch.filtered:
        batch.temperature[row] = filters.apply(logits_RV.numpy()[row], token_ids, position)
    ids_R = ops.sample(logits_RV, batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.uniform)
    ids = _usable_ids(logits_RV, ids_R)
    if settle is not None:
        ids = settle(ids)
    if raw_LV is None:
        return ids, {}
    # A row without a token still needs a valid id here; its entry is dropped by the caller with the row.
    chosen_L = torch.tensor([max(ids[row], 0) for row in wanted], dtype=torch.int64)
    found = token_logprobs(raw_LV, chosen_L, [count for _, count in batch.logprobs], ops)
    return ids, dict(zip(wanted, found, strict=True))


def _usable_ids(logits_RV: Tensor, ids_R: Tensor) -> list[int]:
    """The ids as a list, NO_TOKEN where the chosen logit is not finite.

    One look at the chosen logits is enough: a NaN or infinity in the hidden state reaches every logit of its row.
    """
    ids = ids_R.numpy()
    num_rows, vocab_size = logits_RV.shape
    in_range = (ids >= 0) & (ids < vocab_size)
    chosen = logits_RV.numpy()[np.arange(num_rows), np.where(in_range, ids, 0)]
    return np.where(in_range & np.isfinite(chosen), ids, NO_TOKEN).tolist()  # type: ignore[no-any-return]
