"""Constrained outputs through the whole engine: all that are finished validate, and none depends on the batch."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structured.corpus import Case, cases, schema_case

from checkpoints import write_checkpoint
from penstock import LLM, GrammarSpec, SamplingParams
from penstock.engine.core import EngineCore
from penstock.frontend.tokenizer import Tokenizer
from penstock.messages import EngineRequest, FinishReason, GrammarKind
from whole_engine import Finished, build, engine_config, request, run

NUM_CASES = 150
MAX_TOKENS = 120
TEMPERATURES = (0.0, 0.3, 1.0, 2.0)
PERSON = GrammarSpec.json_schema({
    "type": "object", "additionalProperties": False, "required": ["name", "age", "tags"],
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150},
                   "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3}},
})  # fmt: skip

LONG_KEYS = {
    "type": "object", "additionalProperties": False,
    "required": ["a name that takes many tokens", "another of these names"],
    "properties": {"a name that takes many tokens": {"type": "boolean"}, "another of these names": {"type": "null"}},
}  # fmt: skip
FURTHER_SAMPLERS: dict[str, Any] = {
    "dry_multiplier": 0.8, "dry_allowed_length": 1, "top_n_sigma": 3.0, "typical_p": 0.95, "xtc_probability": 0.5,
    "xtc_threshold": 0.02, "dynatemp_range": 0.5, "mirostat": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, vocab_size=400, tokenizer=True, max_position_embeddings=512)
    return path


def check_all(llm: LLM, corpus: Sequence[Case]) -> None:
    sampling = [
        SamplingParams(
            temperature=TEMPERATURES[index % 4], seed=index, max_tokens=MAX_TOKENS, grammar=case.spec,
            top_p=0.9 if index % 5 == 0 else 1.0, repetition_penalty=1.2 if index % 7 == 0 else 1.0,
            logprobs=1 if index % 11 == 0 else None,
        )
        for index, case in enumerate(corpus)
    ]  # fmt: skip
    generations = llm.generate(["Give me one, please:"] * len(corpus), sampling)
    counts = dict.fromkeys(FinishReason, 0)
    for case, generation in zip(corpus, generations, strict=True):
        [completion] = generation.outputs
        assert completion.finish_reason is not None
        counts[completion.finish_reason] += 1
        if completion.finish_reason is FinishReason.STOP:
            assert case.is_valid(completion.text), (case.spec, completion.text)
        elif completion.finish_reason is FinishReason.ERROR:
            assert completion.error is not None
            assert completion.error.code == "invalid_grammar", completion.error
    assert counts[FinishReason.STOP] >= 0.8 * len(corpus), counts
    assert counts[FinishReason.ERROR] <= 0.1 * len(corpus), counts


def test_finished_outputs_of_random_weights_validate(checkpoint: Path) -> None:
    with LLM(str(checkpoint), max_num_seqs=32, num_threads=1) as llm:
        check_all(llm, list(itertools.islice(cases(seed=1), NUM_CASES)))


def test_finished_outputs_of_the_bundled_model_validate() -> None:
    with LLM(max_num_seqs=32, num_threads=1) as llm:
        check_all(llm, list(itertools.islice(cases(seed=2), NUM_CASES)))


def test_no_output_depends_on_jumping_over_forced_text(checkpoint: Path) -> None:
    corpus = [schema_case(LONG_KEYS), *itertools.islice(cases(seed=3), NUM_CASES)]
    sampling = [
        SamplingParams(temperature=TEMPERATURES[index % 4], seed=index, max_tokens=MAX_TOKENS, grammar=case.spec)
        for index, case in enumerate(corpus)
    ]
    found, num_steps = [], []
    with LLM(str(checkpoint), max_num_seqs=32, num_threads=1) as llm:
        for jumps in (True, False):
            llm._core.executor.runner._batch.masks.jumps = jumps  # type: ignore[attr-defined]
            before = llm._core.stats().num_steps
            generations = llm.generate(["Give me one:"] * len(corpus), sampling)
            num_steps.append(llm._core.stats().num_steps - before)
            found.append([(one.outputs[0].token_ids, one.outputs[0].finish_reason) for one in generations])
            before = llm._core.stats().num_steps
            llm.generate(["Give me one:"], sampling[:1])
            num_steps.append(llm._core.stats().num_steps - before)
    assert found[0] == found[1]
    assert num_steps[1] < 0.6 * num_steps[3]  # one row with much forced text takes fewer steps


def engine(path: Path, **settings: object) -> EngineCore:
    core = build(engine_config(path, **settings))  # type: ignore[arg-type]
    core.set_vocabulary(Tokenizer.load(path).vocabulary().of_size(400))
    return core


def constrained_requests(path: Path) -> list[EngineRequest]:
    """Half of them constrained, with all that a draw may depend on."""
    eos = Tokenizer.load(path).eos_token_ids
    rng = random.Random(3)
    requests = []
    for index in range(40):
        grammar = PERSON if index % 2 else None
        one = request(
            str(index), [rng.randrange(260, 400) for _ in range(rng.randint(4, 60))], 48, temperature=float(index % 3),
            seed=index, grammar=grammar, frequency_penalty=0.3 if index % 5 == 0 else 0.0,
            logprobs=2 if index % 4 == 0 else None, logit_bias={300: 5.0},
        )  # fmt: skip
        more = FURTHER_SAMPLERS if index % 6 in (1, 4) else {}
        one.sampling = msgspec.structs.replace(one.sampling, max_tokens=48, **more)
        one.stop_token_ids = eos
        requests.append(one)
    return requests


def summary(finished: dict[str, Finished]) -> dict[str, object]:
    return {
        request_id: (one.token_ids, [entry.logprob for entry in one.logprobs], one.finish_reason)
        for request_id, one in finished.items()
    }


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[str, object]:
    core = engine(checkpoint, prefix_caching=False)
    found = summary(run(core, constrained_requests(checkpoint), 1))
    core.close()
    assert [reason for _, _, reason in found.values()].count(FinishReason.STOP) >= 20
    return found


@pytest.mark.parametrize(("settings", "concurrency"), [
    ({"prefix_caching": False}, 32), ({"max_num_batched_tokens": 40}, 32),
    ({"num_blocks": 40, "max_num_batched_tokens": 64}, 32),
])  # fmt: skip
def test_no_output_depends_on_the_batch(
    checkpoint: Path, alone: dict[str, object], settings: dict[str, object], concurrency: int
) -> None:
    core = engine(checkpoint, **settings)
    finished = run(core, constrained_requests(checkpoint), concurrency)
    core.close()
    assert summary(finished) == alone
    if "num_blocks" in settings:
        assert sum(one.num_preemptions for one in finished.values()) > 0


def test_what_contradicts_the_grammar_is_an_error_and_ends_that_request_only(checkpoint: Path) -> None:
    with LLM(str(checkpoint), max_num_seqs=4, num_threads=1) as llm:
        clash = SamplingParams(max_tokens=9, min_tokens=9, grammar=GrammarSpec.choice(["ab"]), seed=1)
        fine = SamplingParams(max_tokens=9, grammar=GrammarSpec.choice(["ab"]), seed=1)
        first, second, several = llm.generate(["x", "y", "z"], [clash, fine, SamplingParams(n=3, grammar=fine.grammar)])
    assert first.outputs[0].error is not None
    assert first.outputs[0].error.code == "grammar_conflict"
    assert second.outputs[0].text == "ab"
    assert second.outputs[0].finish_reason is FinishReason.STOP
    assert [one.text for one in several.outputs] == ["ab"] * 3


def test_reasoning_is_ended_by_force(checkpoint: Path) -> None:
    """Random weights never end it themselves; what follows is free, and ends where any text ends."""
    close = Tokenizer.load(checkpoint).token_to_id("<|im_start|>")
    spec = GrammarSpec(GrammarKind.TEXT, after="<|im_start|>", after_tokens=9)
    with LLM(str(checkpoint), max_num_seqs=4, num_threads=1) as llm:
        sampling = [SamplingParams(max_tokens=40, seed=seed, grammar=spec) for seed in range(6)]
        generations = llm.generate(["x"] * 6, sampling)
    for generation in generations:
        [completion] = generation.outputs
        assert completion.error is None, completion.error
        assert close in completion.token_ids[:10]
        if len(completion.token_ids) == 40:
            assert completion.finish_reason is FinishReason.LENGTH, "free text is cut off, not whole"


def test_the_budget_decides_between_whole_and_cut_off(checkpoint: Path) -> None:
    with LLM(str(checkpoint), max_num_seqs=4, num_threads=1) as llm:
        sampling = [
            SamplingParams(max_tokens=budget, temperature=2.0, seed=budget, grammar=PERSON)
            for budget in (4, 45, 60, 90)
        ]
        short, *long = llm.generate(["x"] * 4, sampling)
    assert short.outputs[0].finish_reason is FinishReason.LENGTH
    for generation, parameters in zip(long, sampling[1:], strict=True):
        assert generation.outputs[0].finish_reason is FinishReason.STOP
        assert len(generation.outputs[0].token_ids) <= (parameters.max_tokens or 0)
        assert set(json.loads(generation.outputs[0].text)) == {"name", "age", "tags"}
