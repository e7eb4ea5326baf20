"""Sampling and log-probabilities against torch, per instruction set."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from draws import (
    Draw,
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
from penstock.kernels import ops as op_table

REFERENCE = op_table.load("reference", 1)


def drawing(ops: op_table.Ops) -> Draw:
    return lambda logits, settings: ops.sample(logits, *columns(settings))


@pytest.mark.parametrize("vocab", [1, 5, 16, 100, 1025, 5003, 32000])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_reference(native: op_table.Ops, vocab: int, seed: int) -> None:
    rng = random.Random(seed * 100_000 + vocab)
    settings = [random_settings(rng, vocab) for _ in range(20)]
    logits = random_logits(20, vocab, seed)
    got = drawing(native)(logits, settings)
    for row, chosen in enumerate(got.tolist()):
        assert_drawn(logits[row], settings[row], chosen)
    assert (got == drawing(REFERENCE)(logits, settings)).float().mean() > 0.9


def test_orders_that_are_bad_for_partial_selection(native: op_table.Ops) -> None:
    check_orders(drawing(native), 20_000, (0, 1, 40, 3000))


def test_ties(native: op_table.Ops) -> None:
    check_ties(drawing(native))


def test_excluded_tokens_are_never_drawn(native: op_table.Ops) -> None:
    check_excluded(drawing(native))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_is_refused_alone(native: op_table.Ops, bad: float) -> None:
    check_bad_rows(drawing(native), bad, 4001)


def test_a_row_does_not_depend_on_the_others_or_on_threads(native: op_table.Ops) -> None:
    rng = random.Random(5)
    logits = random_logits(16, 33_000, 5)
    settings = [random_settings(rng, 33_000) for _ in range(16)]
    together = drawing(native)(logits, settings)
    alone = op_table.load("native", 1, isa=native.isa)
    for row in range(16):
        assert drawing(alone)(logits[row : row + 1].clone(), settings[row : row + 1]).item() == together[row]


def test_the_smallest_temperatures_are_almost_greedy(native: op_table.Ops) -> None:
    check_smallest_temperatures(drawing(native))


def test_draws_follow_the_probabilities(native: op_table.Ops) -> None:
    logits = torch.tensor([0.5, 0.2, 0.3]).log().repeat(1000, 1)
    settings = [Settings(uniform=(i + 0.5) / 1000) for i in range(1000)]
    assert drawing(native)(logits, settings).bincount().tolist() == [500, 200, 300]


@pytest.mark.parametrize("vocab", [1, 17, 1000, 32_003])
@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_top_logprobs(native: op_table.Ops, vocab: int, k: int) -> None:
    check_top_logprobs(native.top_logprobs, 9, vocab, k, tolerance=1e-6)


def test_logprobs_of_a_bad_row_are_nan_and_its_own(native: op_table.Ops) -> None:
    check_logprobs_of_a_bad_row(native.top_logprobs)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 97, 4096, 32_001])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_masked_logits_are_what_the_mask_keeps(native: op_table.Ops, vocab: int, density: float) -> None:
    words = -(-vocab // 32)
    rng = np.random.default_rng(vocab)
    keep = rng.random((3, words * 32)) < density
    masks = np.packbits(keep, axis=1, bitorder="little").view(np.int32)
    logits = random_logits(5, vocab, seed=vocab)
    rows = [4, 0, 3]
    expected, given = logits.clone(), logits.clone()
    REFERENCE.mask_logits(expected, rows, masks)
    native.mask_logits(given, rows, masks)
    assert torch.equal(given, expected)
    for index, row in enumerate(rows):
        kept = torch.from_numpy(keep[index, :vocab])
        assert torch.equal(expected[row][kept], logits[row][kept])
        assert (expected[row][~kept] == -torch.inf).all()
    assert torch.equal(expected[[1, 2]], logits[[1, 2]])
