"""From logits to tokens: penalties, filters, draws, log-probabilities.

Owns: nothing.
Never: knows about the scheduler.
"""

from penstock.sampling.logit_edits import LogitEdits
from penstock.sampling.logprobs import logprob_entries, token_logprobs
from penstock.sampling.penalties import TokenCounts
from penstock.sampling.randomness import uniforms
from penstock.sampling.row_filters import RowFilters
from penstock.sampling.sampler import NO_TOKEN, FilteredRow, RowEdits, SamplingBatch, sample

__all__ = [
    "NO_TOKEN",
    "FilteredRow",
    "LogitEdits",
    "RowEdits",
    "RowFilters",
    "SamplingBatch",
    "TokenCounts",
    "logprob_entries",
    "sample",
    "token_logprobs",
    "uniforms",
]
