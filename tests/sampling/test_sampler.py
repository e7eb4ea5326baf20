"""Everything of SamplingParams on rows of logits: edits in order, filters, draws, log-probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import ops as op_table
from penstock.messages import SamplingParams
from penstock.sampling import NO_TOKEN, LogitEdits, RowEdits, SamplingBatch, TokenCounts, sample

VOCAB = 50


@pytest.fixture(params=["reference", "native"])
def ops(request):
    return op_table.load(request.param, 2)


def batch(rows: int, edits=(), logprobs=(), **values) -> SamplingBatch:
    """Greedy rows unless `values` says otherwise: for each parameter a number, or a list with one for each row."""

    def column(name, default, dtype):
        value = values.get(name, default)
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    return SamplingBatch(
        column("temperature", 0.0, torch.float32),
        column("top_k", 0, torch.int32),
        column("top_p", 1.0, torch.float32),
        column("min_p", 0.0, torch.float32),
        column("uniform", 0.0, torch.float64),
        edits,
        logprobs,
    )


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, VOCAB), generator=torch.Generator().manual_seed(seed)) * 2


def edited(logits, params, tokens=(1,), num_prompt=1, stops=()) -> np.ndarray:
    """One row of logits after the edits of a request with these tokens."""
    ids = np.array(tokens, dtype=np.int64)
    edits = LogitEdits.of(params, stops, ids, num_prompt, VOCAB)
    row = np.array(logits, dtype=np.float32)
    if edits is not None:
        edits.apply(row, ids[num_prompt:])
    return row


def test_rows_that_change_nothing_have_no_edits():
    ids = np.array([1, 2], dtype=np.int64)
    assert LogitEdits.of(SamplingParams(temperature=0.3, top_k=3, top_p=0.5), (5,), ids, 1, VOCAB) is None
    assert LogitEdits.of(SamplingParams(min_tokens=3), (), ids, 1, VOCAB) is None
    assert LogitEdits.of(SamplingParams(min_tokens=3), (5,), ids, 1, VOCAB) is not None


def test_greedy_takes_the_first_of_the_largest(ops):
    logits = torch.zeros((3, VOCAB))
    logits[0, [7, 9]] = 2.0
    logits[1, 49] = 0.5
    assert sample(logits, batch(3), ops)[0] == [7, 49, 0]


def test_logit_bias_is_added():
    row = edited([0.0] * VOCAB, SamplingParams(logit_bias={3: 2.5, 7: -100.0}))
    assert row[3] == 2.5
    assert row[7] == -100.0
    assert np.count_nonzero(row) == 2


def test_min_tokens_masks_the_stop_tokens_until_reached():
    params = SamplingParams(min_tokens=2)
    for num_output, masked in ((0, True), (1, True), (2, False)):
        row = edited([0.0] * VOCAB, params, tokens=[1] * (1 + num_output), stops=(4, 9))
        assert np.flatnonzero(np.isneginf(row)).tolist() == ([4, 9] if masked else [])


def test_bad_words_are_masked_where_the_output_would_complete_them():
    params = SamplingParams(bad_words_token_ids=((5,), (6, 7), (6, 8, 9)))

    def masked(*output):
        return np.flatnonzero(np.isneginf(edited([0.0] * VOCAB, params, tokens=[6, *output]))).tolist()

    assert masked() == [5]  # the 6 of the prompt does not count
    assert masked(6) == [5, 7]
    assert masked(6, 8) == [5, 9]
    assert masked(1, 6, 8) == [5, 9]
    assert masked(6, 8, 1) == [5]


def expected_penalties(logits, params, tokens, num_prompt) -> list[float]:
    """vLLM's definition, spelled out."""
    output = tokens[num_prompt:]
    result = []
    for token_id, value in enumerate(np.array(logits, dtype=np.float32)):
        if token_id in tokens and params.repetition_penalty != 1.0:
            penalty = np.float32(params.repetition_penalty)
            value = value / penalty if value > 0 else value * penalty
        value = value - np.float32(params.frequency_penalty) * np.float32(output.count(token_id))
        value = value - np.float32(params.presence_penalty) * np.float32(token_id in output)
        result.append(float(value))
    return result


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=80),
    st.integers(0, 80),
    st.sampled_from([1.0, 0.5, 1.3, 2.0]),
    st.sampled_from([0.0, -1.5, 0.7]),
    st.sampled_from([0.0, -0.3, 1.1]),
)
def test_penalties_are_those_of_vllm(tokens, num_prompt, repetition, presence, frequency):
    num_prompt = min(num_prompt, len(tokens))
    params = SamplingParams(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    logits = logits_of(1, len(tokens))[0].tolist()
    row = edited(logits, params, tokens, num_prompt)
    assert row.tolist() == pytest.approx(expected_penalties(logits, params, tokens, num_prompt), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=150), st.integers(1, 150))
def test_counts_grown_token_by_token_equal_counts_rebuilt(tokens, num_known):
    ids = np.array(tokens, dtype=np.int64)
    grown = TokenCounts(ids[:num_known], 1)
    for token_id in tokens[num_known:]:
        grown.add(token_id)
    rows = []
    for counts in (grown, TokenCounts(ids, 1)):
        row = np.linspace(-3, 3, 201, dtype=np.float32)
        counts.apply(row, 1.7, 0.3, 0.9)
        rows.append(row)
    assert rows[0].tobytes() == rows[1].tobytes()


def test_edits_come_before_filters_and_masks_survive_penalties(ops):
    """The best token is banned, the next one penalised away: top-k 1 then keeps the third."""
    logits = torch.zeros((1, VOCAB))
    logits[0, 10], logits[0, 11], logits[0, 12] = 9.0, 8.0, 7.0
    params = SamplingParams(bad_words_token_ids=((10,),), frequency_penalty=1.5, repetition_penalty=0.5)
    tokens = np.array([1, 11, 11, 10], dtype=np.int64)
    edits = LogitEdits.of(params, (), tokens, 1, VOCAB)
    assert edits is not None
    made = batch(1, [RowEdits(0, edits, tokens[1:])], temperature=1.0, top_k=1, uniform=0.999)
    ids, _ = sample(logits, made, ops)
    # 11 becomes 8 / 0.5 - 3 = 13, still the best; with a repetition penalty of 2 it is 1, behind 12.
    assert ids == [11]
    logits = torch.zeros((1, VOCAB))
    logits[0, 10], logits[0, 11], logits[0, 12] = 9.0, 8.0, 7.0
    stronger = SamplingParams(bad_words_token_ids=((10,),), frequency_penalty=1.5, repetition_penalty=2.0)
    edits = LogitEdits.of(stronger, (), tokens, 1, VOCAB)
    assert edits is not None
    made = batch(1, [RowEdits(0, edits, tokens[1:])], temperature=1.0, top_k=1, uniform=0.999)
    assert sample(logits, made, ops)[0] == [12]


def test_draws_follow_the_distribution(ops):
    """A fine grid of uniforms through one row: shares of tokens equal their probabilities."""
    rows = 4000
    logits = logits_of(1).expand(rows, -1).clone()
    grid = [(index + 0.5) / rows for index in range(rows)]
    ids, _ = sample(logits.clone(), batch(rows, temperature=0.8, uniform=grid), ops)
    shares = np.bincount(ids, minlength=VOCAB) / rows
    expected = (logits[0] / 0.8).softmax(-1).numpy()
    assert abs(shares - expected).max() <= 1.01 / rows


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 3}, 3),
        ({"top_p": 0.5}, None),
        ({"min_p": 0.3}, None),
        ({"top_k": 8, "top_p": 0.7, "min_p": 0.05}, None),
    ],
)
def test_filters_keep_what_their_definitions_keep(filters, kept, ops):
    rows = 500
    logits = logits_of(1, 4).expand(rows, -1).clone()
    grid = [(index + 0.5) / rows for index in range(rows)]
    ids, _ = sample(logits.clone(), batch(rows, temperature=1.0, uniform=grid, **filters), ops)
    probabilities = logits[0].softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    allowed = order[: filters.get("top_k", VOCAB)]
    total = sum(float(probabilities[token_id]) for token_id in allowed)
    nucleus, mass = [], 0.0
    for token_id in allowed:
        if mass < filters.get("top_p", 1.0) * total:
            nucleus.append(token_id)
        mass += float(probabilities[token_id])
    floor = filters.get("min_p", 0.0) * float(probabilities.max())
    expected = {token_id for token_id in nucleus if float(probabilities[token_id]) >= floor}
    assert set(ids) <= expected
    assert len(set(ids)) >= len(expected) - 2  # the rarest may fall between two points of the grid
    assert kept is None or len(expected) == kept


def test_a_row_does_not_depend_on_its_neighbours(ops):
    logits = logits_of(6, 9)
    temperature = [0.0, 1.0, 0.7, 0.0, 1.5, 1.0]
    made = {
        "temperature": temperature,
        "top_p": [1.0, 0.9, 1.0, 0.2, 0.8, 1.0],
        "uniform": [0.1, 0.5, 0.9, 0.3, 0.7, 0.2],
    }
    wanted = [(row, 2) for row in range(6)]
    ids, logprobs = sample(logits.clone(), batch(6, logprobs=wanted, **made), ops)
    for row in range(6):
        alone = {name: values[row] for name, values in made.items()}
        one, one_logprobs = sample(logits[row : row + 1].clone(), batch(1, logprobs=[(0, 2)], **alone), ops)
        assert one == [ids[row]]
        assert one_logprobs[0] == logprobs[row]


def test_logprobs_are_of_the_raw_logits(ops):
    logits = logits_of(3, 2)
    raw = logits.log_softmax(-1)
    tokens = np.array([1, 2, 3], dtype=np.int64)
    params = SamplingParams(logit_bias={int(logits[1].argmax()): -100.0}, repetition_penalty=1.5)
    edits = LogitEdits.of(params, (), tokens, 1, VOCAB)
    assert edits is not None
    ids, found = sample(logits, batch(3, [RowEdits(1, edits, tokens[1:])], [(1, 4), (2, 0)]), ops)
    assert sorted(found) == [1, 2]
    entry = found[1]
    assert entry.token_id == ids[1]
    assert entry.logprob == pytest.approx(float(raw[1, ids[1]]), abs=1e-5)
    assert entry.rank > 1
    assert entry.top_ids == raw[1].topk(4).indices.tolist()
    assert entry.top_logprobs == pytest.approx(raw[1].topk(4).values.tolist(), abs=1e-5)
    assert (found[2].rank, found[2].top_ids, found[2].top_logprobs) == (1, [], [])


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_usable_number_gives_no_token_and_spares_the_others(bad, temperature, ops):
    logits = logits_of(3)
    healthy = logits.clone()
    logits[1] = bad
    values = {"temperature": temperature, "uniform": 0.4}
    ids, _ = sample(logits, batch(3, logprobs=[(1, 1)], **values), ops)
    expected, _ = sample(healthy, batch(3, **values), ops)
    assert ids[1] == NO_TOKEN
    assert (ids[0], ids[2]) == (expected[0], expected[2])


def test_ids_outside_the_vocabulary_are_refused():
    ids = np.array([1], dtype=np.int64)
    for params in (
        SamplingParams(logit_bias={VOCAB: 1.0}),
        SamplingParams(bad_words_token_ids=((1, VOCAB),)),
        SamplingParams(bad_words_token_ids=((-1,),)),
    ):
        with pytest.raises(ValueError, match="vocabulary"):
            LogitEdits.of(params, (), ids, 1, VOCAB)
    with pytest.raises(ValueError, match="vocabulary"):
        LogitEdits.of(SamplingParams(min_tokens=1), (VOCAB,), ids, 1, VOCAB)
