"""What drawing tokens must show, for any op table: `draw` takes logits [T, V] and a row's settings each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from penstock.kernels.reference import sampling as torch_sampling
from penstock.kernels.reference.sampling import kept_weights


@dataclass
class Settings:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.5


Draw = Callable[[Tensor, list[Settings]], Tensor]
TopLogprobs = Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]


def columns(settings: list[Settings]) -> list[Tensor]:
    """The arguments of `sample` behind the logits."""
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.float64)
    rows = zip(*(astuple(each) for each in settings), strict=True)
    return [torch.tensor(row, dtype=dtype) for row, dtype in zip(rows, dtypes, strict=True)]


def random_logits(rows: int, vocab: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def random_settings(rng: random.Random, vocab: int) -> Settings:
    return Settings(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7, 50.0]),
        top_k=rng.choice([0, 0, 1, 2, 20, 500, vocab, vocab + 5]),
        top_p=rng.choice([1.0, 1.0, 0.05, 0.5, 0.9, 0.999]),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.5, 1.0]),
        uniform=rng.random(),
    )


def assert_drawn(logits: Tensor, settings: Settings, chosen: int) -> None:
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


def check_orders(draw: Draw, vocab: int, top_ks: tuple[int, ...]) -> None:
    """Orders that are bad for a search or a partial selection."""
    orders = {
        "rising": torch.linspace(-5, 5, vocab),
        "falling": torch.linspace(5, -5, vocab),
        "equal": torch.zeros(vocab),
        "steps": (torch.arange(vocab) % 7).float() - 3,
    }
    for order, made in orders.items():
        rng = random.Random(order)
        settings = [
            Settings(top_k=top_k, top_p=top_p, uniform=rng.random()) for top_k in top_ks for top_p in (1.0, 0.5, 0.01)
        ]
        for chosen, each in zip(draw(made.repeat(len(settings), 1), settings).tolist(), settings, strict=True):
            assert_drawn(made, each, chosen)


def check_ties(draw: Draw) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0, -1.0]])
    assert draw(logits, [Settings(temperature=0.0)]).item() == 1
    drawn = {draw(logits, [Settings(top_k=1, uniform=u)]).item() for u in (0.0, 0.2, 0.4, 0.6, 0.99)}
    assert drawn == {1, 2, 4}, "equals of the k-th stay"
    drawn = {draw(logits, [Settings(top_p=0.5, uniform=u)]).item() for u in (0.0, 0.2, 0.4, 0.6, 0.99)}
    assert drawn == {1, 2}, "of equals at the edge of top-p, only as many as are needed, lower ids first"
    zeros = torch.tensor([[-0.0, 0.0, -1.0, -0.0]])
    drawn = {draw(zeros, [Settings(top_k=1, uniform=u)]).item() for u in (0.0, 0.5, 0.99)}
    assert drawn == {0, 1, 3}, "zero and minus zero are equal"


def check_excluded(draw: Draw) -> None:
    logits = torch.full((6, 3000), -torch.inf)
    logits[:, [70, 2900]] = 0.0
    uniform = [0.0, 0.499, 0.5, 0.99, 1 - 2**-53, 0.3]
    settings = [Settings(uniform=u) for u in uniform[:5]] + [Settings(top_k=5, top_p=0.99, uniform=0.3)]
    assert draw(logits, settings).tolist() == [70, 70, 2900, 2900, 2900, 70]


def check_bad_rows(draw: Draw, bad: float, vocab: int) -> None:
    logits = random_logits(6, vocab, 0)
    rng = random.Random(0)
    settings = [random_settings(rng, vocab) for _ in range(6)]
    expected = draw(logits, settings)
    logits[1, vocab - 2] = bad
    logits[4, :] = bad
    logits[5, :] = -torch.inf
    got = draw(logits, settings)
    assert got[[1, 4, 5]].tolist() == [-1, -1, -1]
    assert torch.equal(got[[0, 2, 3]], expected[[0, 2, 3]])


def check_smallest_temperatures(draw: Draw) -> None:
    logits = random_logits(3, 999, 1)
    settings = [Settings(temperature=t, uniform=0.7) for t in (1e-6, 1e-30, 1e-45)]
    assert torch.equal(draw(logits, settings), logits.argmax(-1))


def check_logprobs_of_a_bad_row(top_logprobs: TopLogprobs) -> None:
    logits = random_logits(3, 500, 0)
    ids = torch.tensor([4, 5, 6])
    expected = top_logprobs(logits, ids, 4)
    logits[1, 77] = torch.nan
    got = top_logprobs(logits, ids, 4)
    assert got[0][1].isnan()
    assert got[3][1].isnan().all()
    for mine, right in zip(got, expected, strict=True):
        assert torch.equal(mine[[0, 2]], right[[0, 2]])


def check_top_logprobs(top_logprobs: TopLogprobs, rows: int, vocab: int, k: int, tolerance: float) -> None:
    """Equal to torch's, with ties and a row that has one finite logit."""
    k = min(k, vocab)
    logits = random_logits(rows, vocab, k)
    logits[3] = logits[3].round()  # many equals
    logits[4, 1:] = -torch.inf
    ids = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(vocab))
    got, wanted = top_logprobs(logits, ids, k), torch_sampling.top_logprobs(logits, ids, k)
    for mine, right in zip(got, wanted, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(mine, right)
