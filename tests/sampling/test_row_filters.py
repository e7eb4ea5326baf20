"""The further samplers against plain Python written from their definitions, and their place in the order."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from penstock.kernels import ops as op_table
from penstock.messages import SamplingParams
from penstock.sampling import FilteredRow, RowFilters, SamplingBatch, sample
from penstock.sampling.filters import dynamic_temperature, exclude_top_choices, keep_top_n_sigma, keep_typical
from penstock.sampling.repetition import penalise_repetition

VOCAB = 60


def make_row(seed: int, excluded: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    row = (rng.normal(size=VOCAB) * 3).astype(np.float32)
    row[rng.choice(VOCAB, excluded, replace=False)] = -np.inf
    row[rng.integers(VOCAB)] = row[rng.integers(VOCAB)]  # equals happen
    return row


def probabilities(row: np.ndarray) -> list[float]:
    weights = [math.exp(float(x) - float(row.max())) for x in row]
    return [weight / sum(weights) for weight in weights]


def kept(row: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isfinite(row)).tolist())


@pytest.mark.parametrize("seed", range(20))
def test_top_n_sigma(seed: int) -> None:
    row = make_row(seed)
    finite = [float(x) for x in row if math.isfinite(x)]
    mean = sum(finite) / len(finite)
    sigma = math.sqrt(sum((x - mean) ** 2 for x in finite) / len(finite))
    expected = {i for i, x in enumerate(row) if x >= max(finite) - 1.3 * sigma}
    keep_top_n_sigma(row, 1.3)
    assert kept(row) == expected
    assert expected


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mass", [0.05, 0.5, 0.95])
def test_typical(seed: int, mass: float) -> None:
    row = make_row(seed)
    probs = probabilities(row)
    entropy = -sum(p * math.log(p) for p in probs if p > 0)
    order = sorted((abs(-math.log(p) - entropy), i) for i, p in enumerate(probs) if p > 0)
    expected, total = set(), 0.0
    for _, token_id in order:
        expected.add(token_id)
        total += probs[token_id]
        if total >= mass:
            break
    keep_typical(row, mass)
    assert kept(row) == expected


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3, 0.9])
def test_xtc(seed: int, threshold: float) -> None:
    row = make_row(seed)
    probs = probabilities(row)
    top = [i for i, p in enumerate(probs) if p >= threshold]
    expected = kept(row)
    if len(top) > 1:
        lowest = min(probs[i] for i in top)
        expected -= set(top) - {max(i for i in top if probs[i] == lowest)}
    exclude_top_choices(row, threshold)
    assert kept(row) == expected


@pytest.mark.parametrize("seed", range(10))
def test_dynamic_temperature(seed: int) -> None:
    row = make_row(seed)
    probs = [p for p in probabilities(row) if p > 0]
    share = -sum(p * math.log(p) for p in probs) / math.log(len(probs))
    assert dynamic_temperature(row, 0.8, 0.5, 1.5) == pytest.approx(0.3 + 1.0 * share**1.5)
    assert dynamic_temperature(row, 0.4, 0.6, 1.0) == pytest.approx(share)
    flat = np.zeros(VOCAB, dtype=np.float32)
    assert dynamic_temperature(flat, 0.8, 0.5, 1.0) == pytest.approx(1.3)
    sure = np.full(VOCAB, -np.inf, dtype=np.float32)
    sure[3] = 1.0
    assert dynamic_temperature(sure, 0.8, 0.5, 1.0) == pytest.approx(0.3)


def test_mirostat() -> None:
    sampling = SamplingParams(temperature=0.7, seed=0, mirostat=2, mirostat_tau=2.0, mirostat_eta=0.3)
    filters = RowFilters.of(sampling)
    assert filters is not None
    limit, chance = 4.0, random.Random(1)
    for step in range(30):
        row = make_row(step)
        weights = [math.exp((float(x) - float(row.max())) / 0.7) for x in row]
        surprises = [-math.log2(w / sum(weights)) if w else math.inf for w in weights]
        expected = {i for i, s in enumerate(surprises) if s <= max(limit, min(surprises))}
        assert filters.apply(row, np.zeros(1, dtype=np.int64), step) == 0.7
        assert kept(row) == expected
        chosen = chance.choice(sorted(expected))
        surprise = -math.log2(weights[chosen] / sum(weights[i] for i in expected))
        limit -= 0.3 * (surprise - 2.0)
        filters.record(chosen)
        assert filters.state == pytest.approx(limit)
        if step == 15:  # a preemption
            filters = RowFilters.of(sampling, filters.state)
            assert filters is not None


def plain_dry(
    token_ids: list[int], multiplier: float, base: float, allowed: int, breakers: set[int]
) -> dict[int, float]:
    """By trying every earlier place and every length."""
    longest: dict[int, int] = {}
    for place in range(len(token_ids) - 1):
        length = 0
        while (
            length < 64
            and place - length >= 0
            and token_ids[place - length] == token_ids[len(token_ids) - 1 - length]
            and token_ids[place - length] not in breakers
        ):
            length += 1
        follower = token_ids[place + 1]
        if length >= allowed and follower not in breakers:
            longest[follower] = max(longest.get(follower, 0), length)
    return {token_id: multiplier * base ** (length - allowed) for token_id, length in longest.items()}


@pytest.mark.parametrize("seed", range(40))
def test_dry(seed: int) -> None:
    chance = random.Random(seed)
    alphabet = chance.choice([2, 4, 12])
    token_ids = [chance.randrange(alphabet) for _ in range(chance.randint(0, 90))]
    if seed % 4 == 0:
        token_ids = token_ids[:30] * 3
    breakers = set(chance.sample(range(alphabet), chance.randint(0, 1)))
    allowed = chance.randint(1, 4)
    expected = make_row(seed, excluded=0)
    row = expected.copy()
    for token_id, penalty in plain_dry(token_ids, 0.8, 1.3, allowed, breakers).items():
        expected[token_id] -= np.float32(penalty)
    penalise_repetition(
        row, np.array(token_ids, dtype=np.int64), multiplier=0.8, base=1.3, allowed_length=allowed, breakers=breakers
    )
    np.testing.assert_array_equal(row, expected)


def draw(sampling: SamplingParams, rows: int, row: int, position: int = 3) -> int:
    """The token of `row` among `rows` rows of which the others use nothing."""
    logits = torch.from_numpy(np.stack([make_row(seed) for seed in range(rows)]))
    filters = RowFilters.of(sampling)
    assert filters is not None
    batch = SamplingBatch(
        torch.full((rows,), sampling.temperature), torch.zeros(rows, dtype=torch.int32), torch.ones(rows),
        torch.zeros(rows), torch.full((rows,), 0.37, dtype=torch.float64),
        filtered=[FilteredRow(row, filters, np.arange(9) % 3, position)],
    )  # fmt: skip
    return sample(logits, batch, op_table.load("native", 1))[0][row]


ALL = SamplingParams(
    temperature=0.9, seed=4, dry_multiplier=0.7, top_n_sigma=2.0, typical_p=0.9, xtc_probability=0.5, dynatemp_range=0.4
)


def test_a_row_does_not_depend_on_its_neighbours_and_two_draws_are_alike() -> None:
    assert len({draw(ALL, rows, 2) for rows in (3, 5, 9)}) == 1


def test_the_chance_of_xtc_follows_seed_and_position_alone() -> None:
    filters = RowFilters.of(SamplingParams(seed=1, xtc_probability=0.5, xtc_threshold=0.05))
    assert filters is not None
    taken = []
    for position in range(200):
        row = np.array([2.0, 2.0, 0.0], dtype=np.float32)
        filters.apply(row, np.zeros(1, dtype=np.int64), position)
        taken.append(bool(np.isinf(row).any()))
    assert 70 < sum(taken) < 130
    again = np.array([2.0, 2.0, 0.0], dtype=np.float32)
    filters.apply(again, np.zeros(1, dtype=np.int64), 17)
    assert bool(np.isinf(again).any()) == taken[17]


def test_greedy_rows_take_dry_alone() -> None:
    row = np.array([3.0, 2.9, 0.0], dtype=np.float32)
    token_ids = np.array([1, 0, 1], dtype=np.int64)
    greedy = SamplingParams(temperature=0.0, seed=0, dry_multiplier=1.0, dry_allowed_length=1, xtc_probability=1.0,
                            xtc_threshold=0.01, typical_p=0.1, top_n_sigma=0.1)  # fmt: skip
    filters = RowFilters.of(greedy)
    assert filters is not None
    assert filters.apply(row, token_ids, 0) == 0.0
    np.testing.assert_array_equal(row, np.array([2.0, 2.9, 0.0], dtype=np.float32))
    assert RowFilters.of(SamplingParams()) is None


def test_rows_without_hope_stay_without() -> None:
    row = np.full(5, -np.inf, dtype=np.float32)
    filters = RowFilters.of(ALL)
    assert filters is not None
    filters.apply(row, np.arange(4), 0)
    assert not np.isfinite(row).any()
