"""Beam search finds what transformers' does, with the same scores, whatever the width, the penalty and the stopping."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import build_model, write_checkpoint
from penstock.base.errors import ValidationError
from penstock.frontend.beam_search import BeamSearch
from penstock.llm import LLM, AsyncLLM, BeamSearchParams
from penstock.messages import EngineRequest, FinishReason, SamplingParams, TokenLogprobs

MAX_TOKENS = 12
PROMPTS = [[5, 9, 33, 101, 7, 44], [150, 3, 80], list(range(40, 75))]
# The end is likely enough to come, and not at once.
EOS = {"eos_token_id": 17}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("beams")
    write_checkpoint(path, tokenizer=True, vocab_size=400, **EOS)
    return path


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), max_num_seqs=16, num_threads=1) as made:
        yield made


def theirs(model: Any, prompt: list[int], width: int, eos: list[int], **options: Any) -> list[Any]:
    """(tokens without the one that ended them, whether one did, score)."""
    found = model.generate(
        torch.tensor([prompt]), num_beams=width, num_return_sequences=width, max_new_tokens=MAX_TOKENS, do_sample=False,
        output_scores=True, return_dict_in_generate=True, eos_token_id=eos or None, pad_token_id=0, **options,
    )  # fmt: skip
    outputs = []
    for sequence, score in zip(found.sequences[:, len(prompt) :].tolist(), found.sequences_scores, strict=True):
        end = next((at for at, token_id in enumerate(sequence) if token_id in eos), None)
        outputs.append((sequence[:end], end is not None, pytest.approx(score.item(), rel=1e-5, abs=1e-4)))
    return outputs


@pytest.mark.parametrize(("width", "penalty", "early"), [
    (2, 1.0, False), (4, 1.0, False), (4, 0.0, False), (5, 2.0, False), (3, -1.0, False), (4, 1.0, True),
    (6, 0.5, True),
])  # fmt: skip
def test_the_outputs_are_those_of_transformers(llm: LLM, width: int, penalty: float, early: bool) -> None:
    model = build_model(vocab_size=400, **EOS)
    model.generation_config.eos_token_id = None
    params = BeamSearchParams(width, penalty, early)
    eos = list(llm._processor.tokenizer.eos_token_ids)
    num_stopped = 0
    for stops in (eos, []):
        found = llm.beam_search(PROMPTS, params, max_tokens=MAX_TOKENS, ignore_eos=not stops)
        for prompt, generation in zip(PROMPTS, found, strict=True):
            outputs = [(one.token_ids, one.finish_reason is FinishReason.STOP, one.score) for one in generation.outputs]
            assert outputs == theirs(model, prompt, width, stops, length_penalty=penalty, early_stopping=early)
            num_stopped += sum(stopped for _, stopped, _ in outputs)
    assert num_stopped > 0 or penalty > 1  # then long ones win


async def test_the_engine_process_gives_the_same(checkpoint: Path, llm: LLM) -> None:
    params = BeamSearchParams(3)
    async with await AsyncLLM.start(str(checkpoint), max_num_seqs=16, num_threads=1) as other:
        found = await other.beam_search(PROMPTS[0], params, max_tokens=MAX_TOKENS)
    [expected] = llm.beam_search(PROMPTS[0], params, max_tokens=MAX_TOKENS)
    assert [one.token_ids for one in found.outputs] == [one.token_ids for one in expected.outputs]


def test_what_cannot_be_searched_is_refused(llm: LLM) -> None:
    for width in (0, 17):
        with pytest.raises(ValidationError, match="beam_width"):
            llm.beam_search("x", BeamSearchParams(width))
    request = EngineRequest(request_id="r", prompt_token_ids=[1], sampling=SamplingParams(), max_tokens=3,
                            stop_token_ids=(1, 2, 3, 4, 5))  # fmt: skip
    with pytest.raises(ValidationError, match="exceeds 20"):
        BeamSearch(request, BeamSearchParams(16))


def test_a_search_ends_with_its_last_step() -> None:
    request = EngineRequest(request_id="r", prompt_token_ids=[1], sampling=SamplingParams(), max_tokens=2)
    search = BeamSearch(request, BeamSearchParams(2))
    assert [one.prompt_token_ids for one in search.requests()] == [[1]]
    search.advance([TokenLogprobs(5, -0.1, 1, [5, 6], [-0.1, -2.0])])
    assert [one.prompt_token_ids for one in search.requests()] == [[1, 5], [1, 6]]
    search.advance([TokenLogprobs(7, -3.0, 1, [7, 8], [-3.0, -4.0]), TokenLogprobs(9, -0.5, 1, [9, 7], [-0.5, -9.0])])
    assert search.requests() == []
    assert [beam.token_ids for beam in search.results(2)] == [(6, 9), (5, 7)]
