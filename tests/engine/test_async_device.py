"""An engine on a device that works by itself gives what it gives on the CPU, whatever a request asks for."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from delayed_device import DelayedBackend, DelayedEvent, NothingIsReadBack
from penstock.base.errors import DeviceLostError
from penstock.messages import SamplingParams
from penstock.runner import ModelRunner, graph_policy, model_runner, prompt_scores
from penstock.runner.async_device import AsyncDevice
from penstock.runner.staging import ALIGNMENT, Staging
from varied_requests import KINDS, SCHEDULES, make_requests, run_with_aborts, signature
from whole_engine import build, engine_config, request, run


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

    # The rows of these are taken by the next requests while their draws are unheard of.
    aborts = {4: "greedy-1", 9: "greedy-2"}
    late = run_with_aborts(build(config), requests, aborts)
    monkeypatch.undo()
    now = run_with_aborts(build(config), requests, aborts)
    for name, tokens in now.items():
        if name not in aborts.values():
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


@pytest.mark.parametrize("when", ["launch", "read back"])
def test_a_device_that_failed_for_good_ends_the_engine_at_once(checkpoint, backend, monkeypatch, when):
    core = build(engine_config(checkpoint))
    for each in make_requests(["greedy"], 4, 20):
        core.add(each)
    for _ in range(3):
        core.step()
    tried = []

    def fail(*_: object) -> None:
        tried.append(when)
        backend.is_gone = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nwith advice in many lines")

    monkeypatch.setattr(*((ModelRunner, "_forward", fail) if when == "launch" else (DelayedEvent, "synchronize", fail)))
    with pytest.raises(DeviceLostError, match=r"an illegal memory access was encountered\.") as raised:
        core.step()
    assert len(tried) == 1, "nothing is run again"
    assert "many lines" not in str(raised.value)


def test_an_error_on_a_device_that_works_ends_its_request_alone(checkpoint, backend, monkeypatch):
    core = build(engine_config(checkpoint))
    monkeypatch.setattr(DelayedEvent, "synchronize", lambda _self: 1 / 0)
    core.add(request("r", [5, 6], 4))
    outputs = [output for _ in range(3) for output in core.step()]
    assert [output.error.code for output in outputs if output.error] == ["internal_error"]


def test_a_closed_engine_leaves_the_devices_memory(checkpoint, backend, monkeypatch):
    monkeypatch.setattr(graph_policy, "MIN_USES", 2)
    monkeypatch.setattr(graph_policy, "STEPS_APART", 1)
    core = build(engine_config(checkpoint))
    run(core, make_requests(["greedy"], 4, 20), 4)
    assert "replay" in backend.log
    runner = core.executor.runner
    kept = [weakref.ref(each) for each in (runner._pool.tensors[0], runner._model)]
    gc.disable()
    try:
        core.close()
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()
    assert backend.num_released == 1


def test_copies_of_blocks_are_sent_and_not_waited_for(checkpoint, backend, monkeypatch):
    sent, send = [], AsyncDevice.send
    monkeypatch.setattr(AsyncDevice, "send", lambda self, array: sent.append(array.tolist()) or send(self, array))
    core = build(engine_config(checkpoint))
    prompt = [index % 90 + 3 for index in range(64)]
    run(core, [request("first", prompt, 4)], 1)
    found = run(core, [request("second", [*prompt[:40], 95, 96], 4)], 1)["second"]
    assert len(sent) == 2, "a part of a block was copied: from where, and to where"
    assert sent[0] != sent[1]
    monkeypatch.undo()
    alone = run(build(engine_config(checkpoint)), [request("second", [*prompt[:40], 95, 96], 4)], 1)["second"]
    assert found.token_ids == alone.token_ids


def test_prompts_are_scored_and_not_waited_for(checkpoint, backend, monkeypatch):
    def watched(*args):
        with NothingIsReadBack():
            return prompt_scores.score_prompt(*args)

    monkeypatch.setattr(model_runner, "score_prompt", watched)
    monkeypatch.setattr(prompt_scores, "ROWS_PER_PIECE", 16)
    config = engine_config(checkpoint, max_num_batched_tokens=40)
    requests = make_requests(["logprobs", "greedy"], 8, 4)
    late = run(build(config), requests, 4)
    assert "down" in backend.log
    assert [len(each.prompt_logprobs) for each in late.values() if each.prompt_logprobs] != []
    monkeypatch.undo()
    assert signature(late) == signature(run(build(config), requests, 4))


def test_tables_of_one_shape_lie_alike_and_apart():
    arrays = [np.arange(5, dtype=np.int64), np.arange(3, dtype=np.int32), np.zeros(0, dtype=np.int64)]
    offsets, end = Staging.offsets(arrays)
    assert offsets == [0, 48, 64]
    assert end == 64
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    staging = Staging(DelayedBackend(), 256)
    first = staging.place(arrays)
    assert [tensor.tolist() for tensor in first] == [[0, 1, 2, 3, 4], [0, 1, 2], []]
