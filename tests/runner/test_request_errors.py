"""What one request breaks ends that request: the others' results are those of a run without it."""

from __future__ import annotations

import pytest
import torch
from driving import Driver, make_runner
from safetensors.torch import load_file, save_file

from checkpoints import write_checkpoint
from penstock.messages import SamplingParams

POISON = 13
HEALTHY = [[3, 4, 5], [6] * 40, [7, 8] * 9]


@pytest.fixture
def poisoned_path(tmp_path):
    """A checkpoint in which the embedding of one token is not a number."""
    write_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def undisturbed(path) -> list[list[int]]:
    driver = Driver(make_runner(path))
    sequences = [driver.start(f"h{i}", prompt, logit_bias={POISON: -100.0}) for i, prompt in enumerate(HEALTHY)]
    driver.generate(sequences, 8)
    return [sequence.output for sequence in sequences]


def start_all(driver: Driver, guilty_prompt: list[int], **guilty_sampling) -> list:
    """The healthy sequences with a guilty one in their middle."""
    sequences = [driver.start(f"h{i}", prompt, logit_bias={POISON: -100.0}) for i, prompt in enumerate(HEALTHY)]
    sequences.insert(1, driver.start("guilty", guilty_prompt, **guilty_sampling))
    return sequences


def check(sequences, expected, code: str) -> None:
    guilty = sequences.pop(1)
    assert guilty.error is not None
    assert guilty.error.code == code
    assert guilty.output == []
    assert [sequence.error for sequence in sequences] == [None] * 3
    assert [sequence.output for sequence in sequences] == expected


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"logprobs": 3}])
@pytest.mark.parametrize("chunk", [None, 5])
def test_logits_that_are_not_numbers(sampling, chunk, poisoned_path):
    driver = Driver(make_runner(poisoned_path))
    sequences = start_all(driver, [1, 2, POISON, 4, 5, 6, 7], **sampling)
    driver.generate(sequences, 8, chunk)
    check(sequences, undisturbed(poisoned_path), "internal_error")


@pytest.mark.parametrize("place", ["forward", "logits"])
def test_an_exception_in_a_whole_step_is_narrowed_down_to_its_request(place, poisoned_path, monkeypatch):
    runner = make_runner(poisoned_path)
    driver = Driver(runner)
    original = getattr(runner._model, place)
    calls = []

    def fragile(*tensors):
        calls.append(len(tensors[0]))
        if (place == "forward" and POISON in tensors[0]) or (place == "logits" and tensors[0].isnan().any()):
            raise RuntimeError("a kernel gave up")
        return original(*tensors)

    monkeypatch.setattr(runner._model, place, fragile)
    sequences = start_all(driver, [1, 2, POISON])
    driver.generate(sequences, 8)
    assert len(calls) > 8
    check(sequences, undisturbed(poisoned_path), "internal_error")


@pytest.mark.parametrize(
    ("prompt", "sampling"),
    [
        ([1, 10**6], {}),
        ([1, -1], {}),
        ([5] * 600, {}),
        ([1, 2], {"logit_bias": {10**6: 1.0}}),
        ([1, 2], {"bad_words_token_ids": ((1, 10**30),)}),
        ([1, 10**30], {}),
    ],
)
def test_requests_that_cannot_be_applied(prompt, sampling, poisoned_path):
    driver = Driver(make_runner(poisoned_path))
    sequences = start_all(driver, prompt, **sampling)
    driver.generate(sequences, 8)
    check(sequences, undisturbed(poisoned_path), "invalid_request")


def test_a_failed_request_that_is_scheduled_again_fails_again_until_it_is_removed(poisoned_path):
    """The next step may have been planned before the failure was known."""
    driver = Driver(make_runner(poisoned_path))
    guilty = driver.start("guilty", [1, POISON])
    driver.step([guilty])
    first = guilty.error
    assert first is not None
    guilty.tokens = [*guilty.tokens, 0]
    driver.step([guilty])
    assert guilty.error == first
    driver.finish(guilty)
    reused = driver.start("guilty", HEALTHY[0], logit_bias={POISON: -100.0})
    driver.generate([reused], 8)
    assert reused.output == undisturbed(poisoned_path)[0]


def test_rows_are_given_back(poisoned_path):
    """Five times as many requests as rows, a third of them failing, and all rows are free at the end."""
    driver = Driver(make_runner(poisoned_path, max_num_seqs=3))
    for turn in range(5):
        prompts = [[3, 4], [POISON] if turn % 2 else [9, 9], [5] * 700]
        sequences = [driver.start(f"{turn}-{i}", prompt) for i, prompt in enumerate(prompts)]
        driver.generate(sequences, 2)
        assert sequences[2].error is not None
    last = [driver.start(f"last{i}", [3, 4, i], logit_bias={POISON: -100.0}) for i in range(3)]
    driver.generate(last, 2)
    assert [len(sequence.output) for sequence in last] == [2, 2, 2]


def test_seeds_of_any_sign_are_taken(poisoned_path):
    driver = Driver(make_runner(poisoned_path))
    seeds = [-(2**63), -1, 0, 2**63 - 1]
    bias = {POISON: -100.0}
    sequences = [driver.start(f"s{seed}", [3, 4], temperature=2.0, seed=seed, logit_bias=bias) for seed in seeds]
    driver.generate(sequences, 12)
    assert len({tuple(sequence.output) for sequence in sequences}) == 4
    assert SamplingParams(seed=-1).seed == -1
