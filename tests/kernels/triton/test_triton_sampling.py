"""Sampling, log-probabilities, masks and penalties against torch and numpy, in the interpreter."""

from __future__ import annotations

import random
from dataclasses import astuple, dataclass

import numpy as np
import pytest
import torch

from penstock.kernels.reference import sampling as torch_sampling
from penstock.kernels.triton import penalties, sampling
from penstock.sampling import TokenCounts


@dataclass
class Settings:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.5


def sample(logits: torch.Tensor, settings: list[Settings]) -> torch.Tensor:
    columns = list(zip(*(astuple(each) for each in settings), strict=True))
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float64)
    return sampling.sample(logits, *(torch.tensor(c, dtype=dtype) for c, dtype in zip(columns, dtypes, strict=True)))


def random_logits(rows: int, vocab: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def random_settings(rng: random.Random, vocab: int) -> Settings:
    return Settings(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7, 50.0]),
        top_k=rng.choice([0, 0, 1, 2, 20, 500, vocab, vocab + 5]),
        top_p=rng.choice([1.0, 1.0, 0.0, 0.05, 0.5, 0.9, 0.999]),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.5, 1.0]),
        uniform=rng.random(),
    )


def assert_drawn(logits: torch.Tensor, settings: Settings, chosen: int) -> None:
    """`chosen` is where the cumulative distribution passes the uniform number, to float32's rounding of a weight."""
    if settings.temperature == 0.0:
        assert chosen == int(logits.argmax())
        return
    weights = torch_sampling.kept_weights(logits, *astuple(settings)[:4])
    cumulative = (weights.cumsum(0) / weights.sum()).tolist()
    slack = 2e-6
    assert weights[chosen] > 0
    assert (cumulative[chosen - 1] if chosen else 0.0) <= settings.uniform + slack
    assert settings.uniform - slack <= cumulative[chosen]


@pytest.mark.parametrize("vocab", [1, 5, 16, 100, 1025, 5003])
def test_equals_the_reference(vocab: int) -> None:
    rng = random.Random(vocab)
    settings = [random_settings(rng, vocab) for _ in range(12)]
    logits = random_logits(12, vocab, vocab)
    columns = [torch.tensor(column) for column in zip(*(astuple(each) for each in settings), strict=True)]
    got = sample(logits, settings)
    for row, chosen in enumerate(got.tolist()):
        assert_drawn(logits[row], settings[row], chosen)
    assert (got == torch_sampling.sample(logits, *columns)).float().mean() > 0.9


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "steps"])
def test_orders_that_are_bad_for_a_search(order: str) -> None:
    vocab = 3000
    made = {
        "rising": torch.linspace(-5, 5, vocab),
        "falling": torch.linspace(5, -5, vocab),
        "equal": torch.zeros(vocab),
        "steps": (torch.arange(vocab) % 7).float() - 3,
    }[order]
    rng = random.Random(order)
    settings = [
        Settings(top_k=top_k, top_p=top_p, uniform=rng.random()) for top_k in (0, 1, 1000) for top_p in (1.0, 0.5, 0.01)
    ]
    for chosen, each in zip(sample(made.repeat(len(settings), 1), settings).tolist(), settings, strict=True):
        assert_drawn(made, each, chosen)


def test_ties() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0, -1.0]])
    assert sample(logits, [Settings(temperature=0.0)]).item() == 1
    drawn = {sample(logits, [Settings(top_k=1, uniform=u)]).item() for u in (0.0, 0.2, 0.4, 0.6, 0.99)}
    assert drawn == {1, 2, 4}, "equals of the k-th stay"
    drawn = {sample(logits, [Settings(top_p=0.5, uniform=u)]).item() for u in (0.0, 0.2, 0.4, 0.6, 0.99)}
    assert drawn == {1, 2}, "of equals at the edge of top-p, only as many as are needed, lower ids first"
    zeros = torch.tensor([[-0.0, 0.0, -1.0, -0.0]])
    drawn = {sample(zeros, [Settings(top_k=1, uniform=u)]).item() for u in (0.0, 0.5, 0.99)}
    assert drawn == {0, 1, 3}, "zero and minus zero are equal"


def test_excluded_tokens_are_never_drawn() -> None:
    logits = torch.full((6, 3000), -torch.inf)
    logits[:, [70, 2900]] = 0.0
    uniform = [0.0, 0.499, 0.5, 0.99, 1 - 2**-53, 0.3]
    settings = [Settings(uniform=u) for u in uniform[:5]] + [Settings(top_k=5, top_p=0.99, uniform=0.3)]
    assert sample(logits, settings).tolist() == [70, 70, 2900, 2900, 2900, 70]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_is_refused_alone(bad: float) -> None:
    logits = random_logits(6, 901, 0)
    rng = random.Random(0)
    settings = [random_settings(rng, 901) for _ in range(6)]
    expected = sample(logits, settings)
    logits[1, 899] = bad
    logits[4, :] = bad
    logits[5, :] = -torch.inf
    got = sample(logits, settings)
    assert got[[1, 4, 5]].tolist() == [-1, -1, -1]
    assert torch.equal(got[[0, 2, 3]], expected[[0, 2, 3]])


def test_a_row_depends_neither_on_others_nor_on_how_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    logits = random_logits(8, 700, 5)
    settings = [random_settings(rng, 700) for _ in range(8)]
    together = sample(logits, settings)
    monkeypatch.setattr(sampling, "_BLOCK", 128)
    for row in range(8):
        assert sample(logits[row : row + 1].clone(), settings[row : row + 1]).item() == together[row]


def test_the_smallest_temperatures_are_almost_greedy() -> None:
    logits = random_logits(3, 999, 1)
    settings = [Settings(temperature=t, uniform=0.7) for t in (1e-6, 1e-30, 1e-45)]
    assert torch.equal(sample(logits, settings), logits.argmax(-1))


@pytest.mark.parametrize("vocab", [1, 17, 1000])
@pytest.mark.parametrize("k", [0, 1, 8])
def test_top_logprobs(vocab: int, k: int) -> None:
    k = min(k, vocab)
    logits = random_logits(6, vocab, k)
    logits[3] = logits[3].round()  # many equals
    logits[4, 1:] = -torch.inf
    ids = torch.randint(vocab, (6,), generator=torch.Generator().manual_seed(vocab))
    got, wanted = sampling.top_logprobs(logits, ids, k), torch_sampling.top_logprobs(logits, ids, k)
    for mine, right in zip(got, wanted, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, right, rtol=2e-6, atol=2e-6)
        else:
            assert torch.equal(mine, right)


def test_logprobs_of_a_bad_row_are_nan_and_its_own() -> None:
    logits = random_logits(3, 500, 0)
    ids = torch.tensor([4, 5, 6])
    expected = sampling.top_logprobs(logits, ids, 4)
    logits[1, 77] = torch.nan
    got = sampling.top_logprobs(logits, ids, 4)
    assert got[0][1].isnan()
    assert got[3][1].isnan().all()
    for mine, right in zip(got, expected, strict=True):
        assert torch.equal(mine[[0, 2]], right[[0, 2]])


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
