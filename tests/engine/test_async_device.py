"""An engine on a device that works by itself gives what it gives on the CPU, whatever a request asks for."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from checkpoints import write_checkpoint
from delayed_device import DelayedBackend, delayed_device
from penstock.messages import EngineRequest, FinishReason, SamplingParams
from penstock.runner import model_runner
from penstock.runner.staging import ALIGNMENT, Staging
from whole_engine import Finished, build, engine_config, request, run

# What each request asks for beside its prompt; the first two are what nearly all requests are.
KINDS = {
    "greedy": {},
    "seeded": {"temperature": 1.3, "seed": 5, "top_p": 0.9, "top_k": 40},
    "penalised": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "edited": {"logit_bias": {7: 3.0, 11: -100.0}, "min_tokens": 6, "bad_words_token_ids": [[5], [9, 7]]},
    "filtered": {"temperature": 1.1, "seed": 9, "dry_multiplier": 0.8, "mirostat": 2, "min_p": 0.02},
    "logprobs": {"logprobs": 3, "temperature": 0.8, "seed": 3, "prompt_logprobs": 1},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path)
    return path


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> DelayedBackend:
    """Engines built after this run on a delayed device."""
    backend = DelayedBackend()
    monkeypatch.setattr(model_runner, "step_device", lambda config, _device: delayed_device(config, backend))
    return backend


def make_requests(kinds: list[str], count: int, max_tokens: int) -> list[EngineRequest]:
    source = random.Random(2)
    prompts = [[source.randrange(3, 200) for _ in range(source.randint(1, 60))] for _ in range(count)]
    return [
        request(f"{kinds[index % len(kinds)]}-{index}", prompt, max_tokens, **KINDS[kinds[index % len(kinds)]])
        for index, prompt in enumerate(prompts)
    ]


def signature(finished: dict[str, Finished]) -> dict[str, object]:
    return {
        name: (each.token_ids, each.finish_reason, each.logprobs, each.prompt_logprobs)
        for name, each in finished.items()
    }


SCHEDULES = {"batched": {}, "chunked": {"max_num_batched_tokens": 40}, "preempted": {"num_blocks": 24}}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_every_request_gets_what_it_gets_on_the_cpu(checkpoint, backend, monkeypatch, schedule):
    config = engine_config(checkpoint, **SCHEDULES[schedule])
    requests = make_requests(list(KINDS), 18, 24)
    late = run(build(config), requests, 12)
    assert "down" in backend.log
    monkeypatch.undo()
    assert signature(late) == signature(run(build(config), requests, 12))


def test_the_next_step_is_launched_before_the_last_ones_tokens_are_there(checkpoint, backend):
    core = build(engine_config(checkpoint))
    run(core, make_requests(["greedy", "seeded"], 4, 30), 4)
    assert "upup" in "".join(backend.log)
    # In steady decoding, two steps are always on their way: up, up, down, up, down, ...
    steady = "".join(backend.log[8:40]).replace("up", "u").replace("down", "d")
    assert "uu" not in steady.strip("u")
    assert "dd" not in steady
    assert backend.log.count("up") == backend.log.count("down"), "one copy to the device and one back a step"


def test_what_looks_back_is_settled_before_it_draws(checkpoint, backend):
    core = build(engine_config(checkpoint))
    finished = run(core, make_requests(["penalised"], 1, 12), 1)
    assert len(finished["penalised-0"].token_ids) == 12


def test_an_abort_with_a_step_under_way_leaves_the_others_alone(checkpoint, backend, monkeypatch):
    config = engine_config(checkpoint, max_num_seqs=3)
    requests = make_requests(["greedy"], 8, 20)

    def with_aborts() -> dict[str, list[int]]:
        core = build(config)
        tokens: dict[str, list[int]] = {each.request_id: [] for each in requests}
        for each in requests:
            core.add(each)
        steps = 0
        while core.has_work():
            for output in core.step():
                tokens[output.request_id] += output.token_ids
            steps += 1
            if steps in (4, 9):  # the rows of these are taken by the next requests while their draws are unheard of
                core.abort([f"greedy-{steps // 4}"], FinishReason.ABORT)
            core.scheduler.check()
        return tokens

    late = with_aborts()
    monkeypatch.undo()
    now = with_aborts()
    for name, tokens in now.items():
        if name not in ("greedy-1", "greedy-2"):
            assert late[name] == tokens


def test_grammars_hold_and_may_replace_a_token(backend, monkeypatch):
    from penstock import LLM
    from penstock.messages import GrammarSpec

    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    wishes = [
        SamplingParams(max_tokens=24, temperature=1.5, seed=index, grammar=GrammarSpec.json_schema(schema), logprobs=1)
        if index % 2
        else SamplingParams(max_tokens=24, temperature=1.5, seed=index)
        for index in range(6)
    ]

    def answers() -> list[tuple[str, object]]:
        with LLM(max_num_seqs=8, max_memory=256 << 20) as llm:
            completions = llm.generate([f"number {index}" for index in range(6)], wishes)
            return [(each.outputs[0].text, each.outputs[0].logprobs) for each in completions]

    late = answers()
    monkeypatch.undo()
    assert late == answers()


def test_tables_of_one_shape_lie_alike_and_apart():
    arrays = [np.arange(5, dtype=np.int64), np.arange(3, dtype=np.int32), np.zeros(0, dtype=np.int64)]
    offsets, end = Staging.offsets(arrays)
    assert offsets == [0, 48, 64]
    assert end == 64
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    staging = Staging(DelayedBackend(), 256)
    first = staging.place(arrays)
    assert [tensor.tolist() for tensor in first] == [[0, 1, 2, 3, 4], [0, 1, 2], []]
