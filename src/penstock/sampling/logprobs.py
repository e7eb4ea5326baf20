"""Log-probabilities as values: of the raw logits, before penalties and temperature, as vLLM reports them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.messages import TokenLogprobs


def token_logprobs(logits_RV: Tensor, ids_R: Tensor, num_top: Sequence[int], ops: Ops) -> list[TokenLogprobs]:
    """For each row the token's log-probability and rank, and its num_top[r] likeliest tokens (at most all)."""
    most = min(max(num_top), logits_RV.shape[1])
    logprobs_R, ranks_R, top_ids_RK, top_logprobs_RK = ops.top_logprobs(logits_RV, ids_R, most)
    rows = zip(
        ids_R.tolist(),
        logprobs_R.tolist(),
        ranks_R.tolist(),
        top_ids_RK.tolist(),
        top_logprobs_RK.tolist(),
        num_top,
        strict=True,
    )
    return [
        TokenLogprobs(token_id, logprob, rank, top_ids[:count], top_logprobs[:count])
        for token_id, logprob, rank, top_ids, top_logprobs, count in rows
    ]
