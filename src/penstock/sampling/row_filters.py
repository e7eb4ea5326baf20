"""The samplers beyond temperature, top-k, top-p and min-p, of one request, in a fixed order.

Order: DRY, top-n-sigma, typical, XTC, dynamic temperature, mirostat; then what every row goes through. At temperature
0 only DRY counts: the others never exclude the likeliest token, but for typical and XTC, and a greedy draw is the
likeliest by definition.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from penstock.messages import SamplingParams
from penstock.sampling.filters import (
    dynamic_temperature,
    exclude_top_choices,
    keep_top_n_sigma,
    keep_typical,
    keep_unsurprising,
)
from penstock.sampling.randomness import uniforms
from penstock.sampling.repetition import penalise_repetition

# The chance of XTC is drawn from another stream than the token.
_XTC_STREAM: Final = np.uint64(0xD1B54A32D192ED03)


class RowFilters:
    """state: mirostat's limit, in bits: all that is remembered between draws. None without mirostat."""

    @classmethod
    def of(cls, sampling: SamplingParams, state: float | None = None) -> RowFilters | None:
        """None when the request uses none of these. state: where an earlier row of the request was left."""
        is_used = (
            sampling.dry_multiplier > 0.0
            or sampling.top_n_sigma > 0.0
            or sampling.typical_p < 1.0
            or sampling.xtc_probability > 0.0
            or sampling.dynatemp_range > 0.0
            or sampling.mirostat
        )
        return cls(sampling, state) if is_used else None

    def __init__(self, sampling: SamplingParams, state: float | None) -> None:
        self._sampling = sampling
        self.state = (2.0 * sampling.mirostat_tau if state is None else state) if sampling.mirostat else None
        self._surprises: NDArray[np.float64] | None = None
        self._breakers = frozenset(sampling.dry_breaker_token_ids)
        self._seeds = np.array([(sampling.seed or 0) % 2**64], dtype=np.uint64) ^ _XTC_STREAM

    def apply(self, logits_V: NDArray[np.float32], token_ids: NDArray[np.int64], position: int) -> float:
        """Edits the row in place; the temperature to draw at. token_ids: prompt and output. position: of the draw."""
        sampling = self._sampling
        if sampling.dry_multiplier > 0.0:
            penalise_repetition(
                logits_V, token_ids, multiplier=sampling.dry_multiplier, base=sampling.dry_base,
                allowed_length=sampling.dry_allowed_length, breakers=self._breakers,
            )  # fmt: skip
        if sampling.temperature == 0.0 or not np.isfinite(logits_V.max()):
            return sampling.temperature
        if sampling.top_n_sigma > 0.0:
            keep_top_n_sigma(logits_V, sampling.top_n_sigma)
        if sampling.typical_p < 1.0:
            keep_typical(logits_V, sampling.typical_p)
        if sampling.xtc_probability > 0.0:
            chance = uniforms(self._seeds, np.array([position], dtype=np.uint64))[0]
            if chance < sampling.xtc_probability:
                exclude_top_choices(logits_V, sampling.xtc_threshold)
        temperature = sampling.temperature
        if sampling.dynatemp_range > 0.0:
            temperature = dynamic_temperature(
                logits_V, temperature, sampling.dynatemp_range, sampling.dynatemp_exponent
            )
        if self.state is not None and temperature > 0.0:
            self._surprises = keep_unsurprising(logits_V, temperature, self.state)
        return temperature

    def record(self, token_id: int) -> None:
        """The token that was drawn from what `apply` left: mirostat's limit follows its surprise."""
        if self.state is not None and self._surprises is not None:
            surprise = float(self._surprises[token_id])
            if np.isfinite(surprise):
                self.state -= self._sampling.mirostat_eta * (surprise - self._sampling.mirostat_tau)
            self._surprises = None
