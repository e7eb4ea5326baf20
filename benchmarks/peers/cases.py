"""The cases of the offline comparison and the figures made of their seconds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One static batch: `batch` random prompts of `prompt_len` tokens, `output_len` tokens each.

    is_decode: t(output_len = 1) is measured too, to take the prompt's part out of the time.
    """

    name: str
    batch: int
    prompt_len: int
    output_len: int
    is_decode: bool = True


CASES = (
    Case("one stream", 1, 64, 128),
    Case("8", 8, 64, 64),
    Case("32", 32, 64, 64),
    Case("64", 64, 64, 64),
    Case("prefill 512", 1, 512, 1, is_decode=False),
)
SHORT_CASES = (
    Case("one stream", 1, 64, 32),
    Case("8", 8, 64, 16),
    Case("prefill 512", 1, 512, 1, is_decode=False),
)


@dataclass(frozen=True)
class Sample:
    """Seconds of a case in one round; first_s is the same batch with one output token (0 where not measured)."""

    whole_s: float
    first_s: float


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds, in tokens/s. decode is None for a prefill, whose end-to-end figure counts prompt tokens.

    spread: (largest - smallest) / median of the end-to-end figure over the rounds.
    """

    end_to_end: float
    decode: float | None
    spread: float


def figures(case: Case, samples: Sequence[Sample]) -> Figures:
    """The figures of one engine's rounds of `case`."""
    tokens = case.batch * case.output_len if case.is_decode else case.batch * case.prompt_len
    whole = [tokens / sample.whole_s for sample in samples]
    decode = None
    if case.is_decode:
        rates = [decode_rate(case, sample) for sample in samples]
        decode = statistics.median(rates)
    middle = statistics.median(whole)
    return Figures(middle, decode, (max(whole) - min(whole)) / middle)


def decode_rate(case: Case, sample: Sample) -> float:
    """Tokens/s after the first token: batch * (output_len - 1) over what the rest took. NaN when noise ate the rest."""
    rest = sample.whole_s - sample.first_s
    return case.batch * (case.output_len - 1) / rest if rest > 0 else float("nan")
