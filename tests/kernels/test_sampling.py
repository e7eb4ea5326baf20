"""Sampling and log-probabilities against torch, per instruction set."""

from __future__ import annotations

import random
from dataclasses import astuple, dataclass

import numpy as np
import pytest
import torch

from penstock.kernels import ops as op_table
from penstock.kernels.reference.sampling import kept_weights

REFERENCE = op_table.load("reference", 1)


@dataclass
class Settings:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.5


def sample(ops: op_table.Ops, logits: torch.Tensor, settings: list[Settings]) -> torch.Tensor:
    columns = list(zip(*(astuple(each) for each in settings), strict=True))
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float64)
    return ops.sample(logits, *(torch.tensor(c, dtype=dtype) for c, dtype in zip(columns, dtypes, strict=True)))


def random_logits(rows: int, vocab: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def random_settings(rng: random.Random, vocab: int) -> Settings:
    return Settings(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7, 50.0]),
        top_k=rng.choice([0, 0, 1, 2, 20, 500, vocab, vocab + 5]),
        top_p=rng.choice([1.0, 1.0, 0.05, 0.5, 0.9, 0.999]),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.5, 1.0]),
        uniform=rng.random(),
    )


def assert_drawn(logits: torch.Tensor, settings: Settings, chosen: int) -> None:
    """`chosen` is where the cumulative distribution passes the uniform number, to float32's rounding of a weight."""
    if settings.temperature == 0.0:
        assert chosen == int(logits.argmax())
        return
    weights = kept_weights(logits, *astuple(settings)[:4])
    cumulative = (weights.cumsum(0) / weights.sum()).tolist()
    slack = 2e-6
    assert weights[chosen] > 0
    assert (cumulative[chosen - 1] if chosen else 0.0) <= settings.uniform + slack
    assert settings.uniform - slack <= cumulative[chosen]


@pytest.mark.parametrize("vocab", [1, 5, 16, 100, 1025, 5003, 32000])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_reference(native: op_table.Ops, vocab: int, seed: int) -> None:
    rng = random.Random(seed * 100_000 + vocab)
    settings = [random_settings(rng, vocab) for _ in range(20)]
    logits = random_logits(20, vocab, seed)
    got = sample(native, logits, settings)
    for row, chosen in enumerate(got.tolist()):
        assert_drawn(logits[row], settings[row], chosen)
    assert (got == sample(REFERENCE, logits, settings)).float().mean() > 0.9


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "steps"])
def test_orders_that_are_bad_for_partial_selection(native: op_table.Ops, order: str) -> None:
    vocab = 20_000
    made = {
        "rising": torch.linspace(-5, 5, vocab),
        "falling": torch.linspace(5, -5, vocab),
        "equal": torch.zeros(vocab),
        "steps": (torch.arange(vocab) % 7).float(),
    }[order]
    rng = random.Random(order)
    settings = [
        Settings(top_k=top_k, top_p=top_p, uniform=rng.random())
        for top_k in (0, 1, 40, 3000)
        for top_p in (1.0, 0.5, 0.01)
    ]
    logits = made.repeat(len(settings), 1)
    for row, chosen in enumerate(sample(native, logits, settings).tolist()):
        assert_drawn(logits[row], settings[row], chosen)


def test_ties(native: op_table.Ops) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0, -1.0]])
    assert sample(native, logits, [Settings(temperature=0.0)]).item() == 1
    drawn = {sample(native, logits, [Settings(top_k=1, uniform=u)]).item() for u in (0.0, 0.2, 0.4, 0.6, 0.99)}
    assert drawn == {1, 2, 4}, "equals of the k-th stay"
    drawn = {sample(native, logits, [Settings(top_p=0.5, uniform=u)]).item() for u in (0.0, 0.2, 0.4, 0.6, 0.99)}
    assert drawn == {1, 2}, "of equals at the edge of top-p, only as many as are needed, lower ids first"


def test_excluded_tokens_are_never_drawn(native: op_table.Ops) -> None:
    logits = torch.full((6, 3000), -torch.inf)
    logits[:, [70, 2900]] = 0.0
    uniform = [0.0, 0.499, 0.5, 0.99, 1 - 2**-53, 0.3]
    settings = [Settings(uniform=u) for u in uniform[:5]] + [Settings(top_k=5, top_p=0.99, uniform=0.3)]
    assert sample(native, logits, settings).tolist() == [70, 70, 2900, 2900, 2900, 70]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_is_refused_alone(native: op_table.Ops, bad: float) -> None:
    logits = random_logits(6, 4001, 0)
    rng = random.Random(0)
    settings = [random_settings(rng, 4001) for _ in range(6)]
    expected = sample(native, logits, settings)
    logits[1, 3999] = bad
    logits[4, :] = bad
    logits[5, :] = -torch.inf
    got = sample(native, logits, settings)
    assert got[[1, 4, 5]].tolist() == [-1, -1, -1]
    assert torch.equal(got[[0, 2, 3]], expected[[0, 2, 3]])


def test_a_row_does_not_depend_on_the_others_or_on_threads(native: op_table.Ops) -> None:
    rng = random.Random(5)
    logits = random_logits(16, 33_000, 5)
    settings = [random_settings(rng, 33_000) for _ in range(16)]
    together = sample(native, logits, settings)
    alone = op_table.load("native", 1, isa=native.isa)
    for row in range(16):
        assert sample(alone, logits[row : row + 1].clone(), settings[row : row + 1]).item() == together[row]


def test_the_smallest_temperatures_are_almost_greedy(native: op_table.Ops) -> None:
    logits = random_logits(3, 999, 1)
    settings = [Settings(temperature=t, uniform=0.7) for t in (1e-6, 1e-30, 1e-45)]
    assert torch.equal(sample(native, logits, settings), logits.argmax(-1))


def test_draws_follow_the_probabilities(native: op_table.Ops) -> None:
    logits = torch.tensor([0.5, 0.2, 0.3]).log().repeat(1000, 1)
    settings = [Settings(uniform=(i + 0.5) / 1000) for i in range(1000)]
    assert sample(native, logits, settings).bincount().tolist() == [500, 200, 300]


@pytest.mark.parametrize("vocab", [1, 17, 1000, 32_003])
@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_top_logprobs(native: op_table.Ops, vocab: int, k: int) -> None:
    k = min(k, vocab)
    logits = random_logits(9, vocab, k)
    logits[3] = logits[3].round()  # many equals
    logits[4, 1:] = -torch.inf
    ids = torch.randint(vocab, (9,), generator=torch.Generator().manual_seed(vocab))
    got, wanted = native.top_logprobs(logits, ids, k), REFERENCE.top_logprobs(logits, ids, k)
    for mine, right in zip(got, wanted, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(mine, right)


def test_logprobs_of_a_bad_row_are_nan_and_its_own(native: op_table.Ops) -> None:
    logits = random_logits(3, 500, 0)
    ids = torch.tensor([4, 5, 6])
    expected = native.top_logprobs(logits, ids, 4)
    logits[1, 77] = torch.nan
    got = native.top_logprobs(logits, ids, 4)
    assert got[0][1].isnan()
    assert got[3][1].isnan().all()
    for mine, right in zip(got, expected, strict=True):
        assert torch.equal(mine[[0, 2]], right[[0, 2]])


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
