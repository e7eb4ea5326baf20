"""From logits to tokens: penalties, filters, draws, log-probabilities.

Owns: nothing.
Never: knows about the scheduler.
"""

from penstock.sampling.logit_edits import LogitEdits
from penstock.sampling.logprobs import token_logprobs
from penstock.sampling.penalties import TokenCounts
from penstock.sampling.randomness import uniforms
from penstock.sampling.sampler import NO_TOKEN, RowEdits, SamplingBatch, sample

__all__ = ["NO_TOKEN", "LogitEdits", "RowEdits", "SamplingBatch", "TokenCounts", "sample", "token_logprobs", "uniforms"]
