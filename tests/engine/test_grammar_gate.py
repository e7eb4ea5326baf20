"""Requests wait for their grammars outside the scheduler, and nobody waits for them."""

from __future__ import annotations

import msgspec
import pytest
from structured.hostile import slow_schema

from penstock.config.engine import CacheConfig, SchedulerConfig
from penstock.engine.core import EngineCore
from penstock.engine.executor import Executor
from penstock.kvcache import KVCacheManager
from penstock.messages import (
    EngineRequest,
    FinishReason,
    GrammarSpec,
    RequestOutput,
    SampledTokens,
    SamplingParams,
    SchedulerOutput,
    StepResult,
    Vocabulary,
)
from penstock.scheduler import Scheduler

VOCABULARY = Vocabulary([*(bytes((byte,)) for byte in range(256)), b"<eos>"], [256], [256])


class PlainRunner:
    def execute(self, output: SchedulerOutput) -> StepResult:
        sampled = {share.request_id: SampledTokens([7]) for share in output.scheduled if share.samples}
        return StepResult(output.step_id, sampled, {}, {}, 0.001)


@pytest.fixture
def core() -> EngineCore:
    config = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256, max_num_queued_requests=100,
        max_num_queued_tokens=10_000, watermark_blocks=1,
    )  # fmt: skip
    scheduler = Scheduler(config, KVCacheManager(CacheConfig(block_size=16, num_blocks=64)))
    core = EngineCore(scheduler, Executor(PlainRunner()))
    yield core
    core.close()


def request(request_id: str, grammar: GrammarSpec | None = None, deadline_s: float | None = None) -> EngineRequest:
    return EngineRequest(
        request_id=request_id, prompt_token_ids=[1, 2, 3], sampling=SamplingParams(grammar=grammar), max_tokens=3,
        deadline_s=deadline_s,
    )  # fmt: skip


def finish(core: EngineCore) -> dict[str, RequestOutput]:
    last: dict[str, RequestOutput] = {}
    while core.has_work():
        for output in core.step():
            if output.finish_reason is not None:
                assert output.request_id not in last
                last[output.request_id] = output
    return last


def test_without_a_vocabulary_a_grammar_is_refused(core: EngineCore) -> None:
    refusal = core.add(request("a", GrammarSpec.json_object()))
    assert refusal is not None
    assert refusal.error is not None
    assert refusal.error.status == 400


def test_a_request_waits_outside_the_scheduler_while_others_run(core: EngineCore) -> None:
    core.set_vocabulary(VOCABULARY)
    assert core.add(request("slow", slow_schema())) is None
    assert core.add(request("good", GrammarSpec.regex("[a-z]+"))) is None
    assert core.add(request("free")) is None
    assert core.scheduler.stats().num_waiting == 1
    assert core.has_work()
    order = list(finish(core).items())
    assert order[0][0] == "free"
    last = dict(order)
    assert last["good"].finish_reason is FinishReason.LENGTH
    assert last["slow"].finish_reason is FinishReason.ERROR
    assert last["slow"].error is not None
    assert "processor time" in last["slow"].error.message
    # What was compiled or refused once is known.
    assert core.add(request("again", GrammarSpec.regex("[a-z]+"))) is None
    assert core.scheduler.stats().num_waiting == 1
    refusal = core.add(request("slow2", slow_schema()))
    assert refusal is not None
    finish(core)


def test_a_refusal_names_the_field_and_each_request_ends_once(core: EngineCore) -> None:
    core.set_vocabulary(VOCABULARY)
    spec = msgspec.structs.replace(GrammarSpec.json_schema({"contains": 1}), param="response_format.json_schema.schema")
    for index in range(4):
        assert core.add(request(str(index), spec)) is None
    twice = core.add(request("0", spec))
    assert twice is not None
    last = finish(core)
    assert sorted(last) == ["0", "1", "2", "3"]
    for output in last.values():
        assert output.error is not None
        assert (output.error.code, output.error.status) == ("invalid_grammar", 400)
        assert output.error.param == "response_format.json_schema.schema"
        assert "'contains' cannot be enforced" in output.error.message


def test_parked_requests_can_be_aborted_and_expire(core: EngineCore) -> None:
    core.set_vocabulary(VOCABULARY)
    core.add(request("gone", GrammarSpec.choice(["a"])))
    core.add(request("late", GrammarSpec.choice(["b"]), deadline_s=0.0))
    [aborted] = core.abort(["gone", "unknown"])
    assert (aborted.request_id, aborted.finish_reason) == ("gone", FinishReason.ABORT)
    last = finish(core)
    assert last["late"].finish_reason is FinishReason.TIMEOUT
    assert list(last) == ["late"]
