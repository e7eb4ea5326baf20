"""Log-probabilities as values: of the raw logits, before penalties and temperature, as vLLM reports them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.messages import TokenLogprobs


def token_logprobs(logits_RV: Tensor, ids_R: Tensor, num_top: Sequence[int], ops: Ops) -> list[TokenLogprobs]:
    """For each row the token's log-probability and rank, and its num_top[r] likeliest tokens (at most all)."""
    most = min(max(num_top), logits_RV.shape[1])
    return logprob_entries(ids_R.tolist(), ops.top_logprobs(logits_RV, ids_R, most), num_top)


def logprob_entries(
    token_ids: Sequence[int], found: Sequence[Tensor | NDArray[np.generic]], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """found: what Ops.top_logprobs gives for these tokens."""
    rows = zip(token_ids, *(each.tolist() for each in found), num_top, strict=True)
    return [
        TokenLogprobs(token_id, logprob, rank, top_ids[:count], top_logprobs[:count])
        for token_id, logprob, rank, top_ids, top_logprobs, count in rows
    ]
