"""Samplers that change one row's logits: top-n-sigma, typical, XTC, dynamic temperature, mirostat.

Pure functions of the row. All but mirostat read probabilities at temperature 1. They leave at least one token;
excluded ones get -inf. Rows are float32; sums are made in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
Probabilities = NDArray[np.float64]


def keep_top_n_sigma(logits_V: Row, num_sigmas: float) -> None:
    """Keeps logits within num_sigmas standard deviations of the largest (Tang et al., arXiv 2411.07641)."""
    finite = logits_V[np.isfinite(logits_V)].astype(np.float64)
    if len(finite):
        logits_V[logits_V < finite.max() - num_sigmas * finite.std()] = -np.inf


def keep_typical(logits_V: Row, mass: float) -> None:
    """Keeps the tokens whose surprise is nearest the expected one, up to a share `mass` of the probability.

    Of equally near ones the lower ids stay (locally typical sampling: Meister et al., arXiv 2202.00666).
    """
    probabilities = _softmax(logits_V)
    possible = np.flatnonzero(probabilities)
    surprises = -np.log(probabilities[possible])
    entropy = float((probabilities[possible] * surprises).sum())
    order = np.argsort(np.abs(surprises - entropy), kind="stable")
    cumulative = np.cumsum(probabilities[possible][order])
    count = int(np.searchsorted(cumulative, mass * cumulative[-1])) + 1
    logits_V[possible[order[count:]]] = -np.inf


def exclude_top_choices(logits_V: Row, threshold: float) -> None:
    """Excludes all tokens at least as probable as `threshold` but the least probable of them (XTC).

    Of equals the highest id stays. With fewer than two such tokens nothing is excluded.
    After https://github.com/oobabooga/text-generation-webui/pull/6335.
    """
    probabilities = _softmax(logits_V)
    top = np.flatnonzero(probabilities >= threshold)
    if len(top) > 1:
        least = top[np.lexsort((-top, probabilities[top]))[0]]
        logits_V[top[top != least]] = -np.inf


def dynamic_temperature(logits_V: Row, temperature: float, spread: float, exponent: float) -> float:
    """A temperature from temperature - spread (at least 0) to temperature + spread: the surer the model, the lower.

    It follows the entropy's share of its largest value, to the power of `exponent`, as in llama.cpp.
    """
    probabilities = _softmax(logits_V)
    possible = probabilities[probabilities > 0]
    lowest = max(0.0, temperature - spread)
    if len(possible) < 2:
        return lowest
    share = float(-(possible * np.log(possible)).sum()) / float(np.log(len(possible)))
    height: float = min(1.0, share) ** exponent
    return lowest + (temperature + spread - lowest) * height


def keep_unsurprising(logits_V: Row, temperature: float, limit: float) -> Probabilities:
    """Keeps tokens whose surprise at `temperature` is at most `limit` bits, at least the likeliest.

    Returns the surprises [V] among those that are kept, in bits; infinite for the others. The truncation of mirostat
    2.0 (Basu et al., arXiv 2007.14966), as in llama.cpp.
    """
    probabilities = _softmax(logits_V.astype(np.float64) / temperature)
    with np.errstate(divide="ignore"):
        surprises = -np.log2(probabilities)
        excluded = surprises > max(limit, float(surprises.min()))
        logits_V[excluded] = -np.inf
        probabilities[excluded] = 0.0
        result: Probabilities = -np.log2(probabilities / probabilities.sum())
    return result


def _softmax(logits_V: Row | Probabilities) -> Probabilities:
    """Probabilities [V]; all zero where nothing is possible."""
    highest = float(logits_V.max())
    if not np.isfinite(highest):
        return np.zeros(len(logits_V))
    weights = np.exp(logits_V.astype(np.float64) - highest)
    result: Probabilities = weights / weights.sum()
    return result
