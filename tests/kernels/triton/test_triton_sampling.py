"""Sampling, log-probabilities, masks and penalties against torch and numpy, in the interpreter."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from draws import (
    Settings,
    assert_drawn,
    check_bad_rows,
    check_excluded,
    check_logprobs_of_a_bad_row,
    check_orders,
    check_smallest_temperatures,
    check_ties,
    check_top_logprobs,
    columns,
    random_logits,
    random_settings,
)  # fmt: skip
from penstock.kernels.reference import sampling as torch_sampling
from penstock.kernels.triton import penalties, sampling
from penstock.sampling import TokenCounts


def sample(logits: torch.Tensor, settings: list[Settings]) -> torch.Tensor:
    return sampling.sample(logits, *columns(settings))


@pytest.mark.parametrize("vocab", [1, 5, 16, 100, 1025, 5003])
def test_equals_the_reference(vocab: int) -> None:
    rng = random.Random(vocab)
    settings = [random_settings(rng, vocab) for _ in range(12)]
    logits = random_logits(12, vocab, vocab)
    got = sample(logits, settings)
    for row, chosen in enumerate(got.tolist()):
        assert_drawn(logits[row], settings[row], chosen)
    assert (got == torch_sampling.sample(logits, *columns(settings))).float().mean() > 0.9


def test_orders_that_are_bad_for_a_search() -> None:
    check_orders(sample, 3000, (0, 1, 1000))


def test_ties() -> None:
    check_ties(sample)


def test_excluded_tokens_are_never_drawn() -> None:
    check_excluded(sample)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_is_refused_alone(bad: float) -> None:
    check_bad_rows(sample, bad, 901)


def test_a_row_depends_neither_on_others_nor_on_how_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    logits = random_logits(8, 700, 5)
    settings = [random_settings(rng, 700) for _ in range(8)]
    together = sample(logits, settings)
    monkeypatch.setattr(sampling, "_BLOCK", 128)
    for row in range(8):
        assert sample(logits[row : row + 1].clone(), settings[row : row + 1]).item() == together[row]


def test_the_smallest_temperatures_are_almost_greedy() -> None:
    check_smallest_temperatures(sample)


@pytest.mark.parametrize("vocab", [1, 17, 1000])
@pytest.mark.parametrize("k", [0, 1, 8])
def test_top_logprobs(vocab: int, k: int) -> None:
    check_top_logprobs(sampling.top_logprobs, 6, vocab, k, tolerance=2e-6)


def test_logprobs_of_a_bad_row_are_nan_and_its_own() -> None:
    check_logprobs_of_a_bad_row(sampling.top_logprobs)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 97, 2049])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_masked_logits_are_what_the_mask_keeps(vocab: int, density: float) -> None:
    words = -(-vocab // 32)
    keep = np.random.default_rng(vocab).random((3, words * 32)) < density
    masks = np.packbits(keep, axis=1, bitorder="little").view(np.int32)
    logits = random_logits(5, vocab, seed=vocab)
    expected = logits.clone()
    torch_sampling.mask_logits(expected, [4, 0, 3], masks)
    sampling.mask_logits(logits, torch.tensor([4, 0, 3]), torch.from_numpy(masks))
    assert torch.equal(logits, expected)


def test_penalties_are_those_of_the_sampling_package() -> None:
    rng = np.random.default_rng(0)
    vocab, rows = 400, [(1.3, 0.5, 0.2), (1.0, 0.0, 0.0), (0.7, -0.4, 1.5), (1.1, 0.0, 0.0)]
    logits = random_logits(len(rows), vocab, 3)
    expected = logits.clone()
    entries = []
    for row, (repetition, frequency, presence) in enumerate(rows):
        tokens = rng.integers(0, vocab, 300)
        counts = TokenCounts(tokens, 100)
        counts.apply(expected[row].numpy(), repetition, presence, frequency)
        output = np.bincount(tokens[100:], minlength=vocab)
        entries += [(row, int(token), float(output[token])) for token in np.unique(tokens)]
    row_ids, token_ids, counted = zip(*entries, strict=True)
    penalties.apply_penalties(
        logits, torch.tensor(row_ids), torch.tensor(token_ids), torch.tensor(counted), torch.tensor(rows)
    )
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits[1], expected[1])
