"""How well a model predicts a text, and how far it is from another that should be the same (the float checkpoint).

Perplexity: exp of the mean negative log-likelihood of each token given those before it in its window; windows do not
overlap, and a window's first token only conditions. Divergence: mean over positions of KL(reference || model) of the
whole next-token distributions, in nats, and how often both like the same token best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.base.errors import ValidationError
from penstock.config.engine import EngineConfig
from penstock.kernels import ops as op_table
from penstock.kernels.devices import open_device
from penstock.layers import AttentionMetadata
from penstock.runner.kv_pool import KVPool, cache_dtype
from penstock.runner.loading import load_model

LOGIT_ROWS_PER_PIECE = 64


@dataclass
class Score:
    """negative_log_likelihood: summed over `num_tokens`, in nats."""

    num_tokens: int = 0
    negative_log_likelihood: float = 0.0

    @property
    def perplexity(self) -> float:
        return math.exp(self.negative_log_likelihood / max(self.num_tokens, 1))


@dataclass
class Comparison:
    """A model's score, the reference's if there is one, and how far the two are apart (sums over tokens)."""

    model: Score
    reference: Score | None = None
    divergence_sum: float = 0.0
    num_same_best: int = 0

    @property
    def divergence(self) -> float:
        """Mean KL(reference || model) in nats."""
        return self.divergence_sum / max(self.model.num_tokens, 1)

    @property
    def same_best(self) -> float:
        """Share of positions where both have the same likeliest token."""
        return self.num_same_best / max(self.model.num_tokens, 1)


class Predictor:
    """A loaded model that gives the logits of one window after the other. Windows are at most max_model_len long."""

    def __init__(self, config: EngineConfig, on_progress: Callable[[float], None]) -> None:
        torch.set_num_threads(config.num_threads)
        self._ops = op_table.load(config.kernels, config.num_threads, device=open_device(config.device))
        dtype = cache_dtype(config, self._ops.layouts)
        self._model = load_model(config, self._ops, on_progress)
        self._block_size = config.cache.block_size
        self._num_blocks = -(-config.scheduler.max_model_len // self._block_size)
        self._pool = KVPool(config.model, self._num_blocks, dtype, self._ops.layouts)
        self.vocab_size = config.model.vocab_size

    def start(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Runs a window -> what `logits` takes rows of."""
        count, device = len(tokens), self._ops.layouts.device
        metadata = AttentionMetadata(
            torch.tensor([0, count], dtype=torch.int32, device=device),
            torch.tensor([count], dtype=torch.int32, device=device),
            torch.arange(self._num_blocks, dtype=torch.int32, device=device)[None],
            torch.arange(count, device=device),
        )
        ids, positions = torch.tensor(tokens, device=device), torch.arange(count, device=device)
        return self._model.forward(ids, positions, self._pool.caches, metadata, self._ops)

    def log_probabilities(self, state: tuple[Tensor, Tensor], begin: int, end: int) -> Tensor:
        """Of the tokens after positions [begin, end) -> float32 [end - begin, V]."""
        x, residual = state
        return self._model.logits(x[begin:end], residual[begin:end].clone(), self._ops).log_softmax(1).cpu()


@torch.inference_mode()
def compare(
    model: Predictor,
    reference: Predictor | None,
    tokens: Sequence[int],
    window: int,
    on_progress: Callable[[float], None],
) -> Comparison:
    """Scores `tokens` in windows. Raises ValidationError when there is nothing to predict or vocabularies differ."""
    if len(tokens) < 2:
        raise ValidationError("The text has fewer than two tokens: there is nothing to predict.")
    if reference is not None and reference.vocab_size != model.vocab_size:
        raise ValidationError("The two models have vocabularies of different sizes, so they cannot be compared.")
    result = Comparison(Score(), None if reference is None else Score())
    for begin in range(0, len(tokens) - 1, window):
        part = tokens[begin : begin + window]
        if len(part) > 1:
            _score_window(result, model, reference, part)
        on_progress(min(begin + window, len(tokens)) / len(tokens))
    return result


def _score_window(result: Comparison, model: Predictor, reference: Predictor | None, tokens: Sequence[int]) -> None:
    targets = torch.tensor(tokens[1:])
    state, reference_state = model.start(tokens), None if reference is None else reference.start(tokens)
    for begin in range(0, len(targets), LOGIT_ROWS_PER_PIECE):
        end = min(begin + LOGIT_ROWS_PER_PIECE, len(targets))
        wanted = targets[begin:end, None]
        found = model.log_probabilities(state, begin, end)
        _add(result.model, found, wanted)
        if reference is None or reference_state is None or result.reference is None:
            continue
        expected = reference.log_probabilities(reference_state, begin, end)
        _add(result.reference, expected, wanted)
        result.divergence_sum += (expected.exp() * (expected - found)).sum(dtype=torch.float64).item()
        result.num_same_best += int((expected.argmax(1) == found.argmax(1)).sum())


def _add(score: Score, log_probabilities: Tensor, wanted: Tensor) -> None:
    score.num_tokens += len(wanted)
    score.negative_log_likelihood -= log_probabilities.gather(1, wanted).sum(dtype=torch.float64).item()
