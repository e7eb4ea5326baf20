"""The loop: order, refusals, isolation of a failing step, one final output each."""

from __future__ import annotations

import threading

from penstock.config.engine import CacheConfig, SchedulerConfig
from penstock.engine.core import EngineCore
from penstock.engine.executor import Executor
from penstock.kvcache import KVCacheManager
from penstock.messages import (
    EngineRequest,
    FinishReason,
    RequestOutput,
    SampledTokens,
    SamplingParams,
    SchedulerOutput,
    StepResult,
)
from penstock.scheduler import Scheduler


class CountingRunner:
    """Draws the number of the step for everyone; raises on the steps it is told to, and can be held up."""

    def __init__(self) -> None:
        self.failing_steps: set[int] = set()
        self.executed: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def execute(self, output: SchedulerOutput) -> StepResult:
        self.gate.wait()
        self.executed.append(output.step_id)
        if output.step_id in self.failing_steps:
            raise RuntimeError("the prompt was: secret")
        sampled = {share.request_id: SampledTokens([output.step_id]) for share in output.scheduled if share.samples}
        return StepResult(output.step_id, sampled, {}, {}, 0.001)


def make_core(runner: CountingRunner, *, max_queued: int = 100) -> EngineCore:
    config = SchedulerConfig(
        max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256, max_num_queued_requests=max_queued,
        max_num_queued_tokens=10_000, watermark_blocks=1,
    )  # fmt: skip
    return EngineCore(Scheduler(config, KVCacheManager(CacheConfig(block_size=16, num_blocks=64))), Executor(runner))


def make_request(request_id: str, max_tokens: int = 4, prompt: int = 5) -> EngineRequest:
    return EngineRequest(
        request_id=request_id, prompt_token_ids=list(range(prompt)), sampling=SamplingParams(), max_tokens=max_tokens
    )


def run_to_end(core: EngineCore) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while core.has_work():
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def test_tokens_come_in_launch_order_and_each_request_ends_once() -> None:
    runner = CountingRunner()
    core = make_core(runner)
    for index in range(5):
        assert core.add(make_request(str(index), max_tokens=index + 1)) is None
    outputs = run_to_end(core)
    core.close()
    assert runner.executed == sorted(runner.executed)
    for index in range(5):
        tokens = [token for output in outputs[str(index)] for token in output.token_ids]
        assert tokens == list(range(1, index + 2))
        assert [output.finish_reason for output in outputs[str(index)]][-1] is FinishReason.LENGTH
        assert sum(output.finish_reason is not None for output in outputs[str(index)]) == 1


def test_the_next_step_is_launched_while_one_runs() -> None:
    runner = CountingRunner()
    core = make_core(runner)
    core.add(make_request("a", max_tokens=3))
    runner.gate.clear()
    assert core.step() == []  # launched; nothing is waited for
    thread = threading.Thread(target=core.step)
    thread.start()  # schedules and launches step 2, then waits for step 1
    while core.stats().num_steps < 2:
        pass
    assert runner.executed == []
    runner.gate.set()
    thread.join()
    run_to_end(core)
    core.close()
    assert runner.executed == [1, 2, 3]


def test_a_step_that_raises_ends_its_requests_and_nothing_else() -> None:
    runner = CountingRunner()
    core = make_core(runner)
    core.add(make_request("doomed"))
    runner.failing_steps.add(1)
    first = run_to_end(core)
    assert first["doomed"][-1].finish_reason is FinishReason.ERROR
    error = first["doomed"][-1].error
    assert error is not None
    assert (error.status, "secret" in error.message) == (500, False)
    core.add(make_request("fine"))
    second = run_to_end(core)
    assert second["fine"][-1].finish_reason is FinishReason.LENGTH
    core.check()
    assert core.stats().num_invariant_violations == 0
    core.close()


def test_refusals_are_final_outputs() -> None:
    core = make_core(CountingRunner(), max_queued=1)
    too_long = core.add(make_request("long", max_tokens=1000))
    assert too_long is not None
    assert too_long.error is not None
    assert (too_long.error.status, too_long.finish_reason) == (400, FinishReason.ERROR)
    assert core.add(make_request("first")) is None
    full = core.add(make_request("second"))
    assert full is not None
    assert full.error is not None
    assert (full.error.status, full.error.code) == (429, "queue_full")
    assert full.error.retry_after_s is not None
    run_to_end(core)
    core.close()


def test_abort_frees_at_once_even_with_a_step_in_flight() -> None:
    core = make_core(CountingRunner())
    core.add(make_request("a", max_tokens=50))
    core.step()
    (final,) = core.abort(["a", "unknown"])
    assert final.finish_reason is FinishReason.ABORT
    stats = core.stats()
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
    assert run_to_end(core) == {}
    core.check()
    assert core.stats().num_invariant_violations == 0
    core.close()
