"""Choosing tokens and their log-probabilities, in torch: row by row, by sorting."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def sample(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, min_p_R: Tensor, uniform_R: Tensor
) -> Tensor:
    """See Ops.sample."""
    settings = zip(
        temperature_R.tolist(), top_k_R.tolist(), top_p_R.tolist(), min_p_R.tolist(), uniform_R.tolist(), strict=True
    )
    return torch.tensor([_sample_row(row, *each) for row, each in zip(logits_RV, settings, strict=True)]).long()


def kept_weights(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Relative probabilities [V] float64, the largest 1, zero where top-k, top-p or min-p excludes the token."""
    weights = ((logits_V.double() - logits_V.max().double()) / temperature).exp()
    if 0 < top_k < len(logits_V):
        weights[logits_V < logits_V.topk(top_k).values[-1]] = 0.0
    if top_p < 1.0:
        order = torch.sort(weights, descending=True, stable=True).indices
        cumulative = weights[order].cumsum(0)
        count = int(torch.searchsorted(cumulative, top_p * cumulative[-1:])) + 1
        weights[order[count:]] = 0.0
    weights[weights < min_p] = 0.0
    return weights


def _sample_row(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    best = float(logits_V.max())
    if not math.isfinite(best):
        return -1
    if temperature == 0.0:
        return int((logits_V == best).nonzero()[0])
    weights = kept_weights(logits_V, temperature, top_k, top_p, min_p)
    cumulative = weights.cumsum(0)
    chosen = int(torch.searchsorted(cumulative, uniform * cumulative[-1:], right=True))
    return min(chosen, int(weights.nonzero()[-1]))


def mask_logits(logits_RV: Tensor, rows: Sequence[int], masks_KW: NDArray[np.int32]) -> None:
    """See Ops.mask_logits."""
    words_KW = torch.from_numpy(masks_KW)
    token_ids = torch.arange(logits_RV.shape[1])
    for row, words_W in zip(rows, words_KW, strict=True):
        allowed_V = (words_W[token_ids // 32] >> (token_ids % 32).int()) & 1
        logits_RV[row, allowed_V == 0] = -math.inf


def top_logprobs(logits_RV: Tensor, ids_R: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See Ops.top_logprobs."""
    logprobs = logits_RV.double().log_softmax(-1)
    chosen = logits_RV.gather(1, ids_R[:, None])
    ranks = (logits_RV > chosen).sum(-1) + 1
    top_ids = torch.sort(logits_RV, dim=-1, descending=True, stable=True).indices[:, :k]
    return (
        logprobs.gather(1, ids_R[:, None])[:, 0].float(),
        ranks.int(),
        top_ids.contiguous(),
        logprobs.gather(1, top_ids).float(),
    )
