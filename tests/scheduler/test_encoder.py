"""An encoder's texts: whole in one step, without blocks, however they arrive."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import CONFIG, request_of, scheduler_of

from penstock.config.engine import CacheConfig
from penstock.kvcache import KVCacheManager
from penstock.messages import FinishReason, PoolingParams, SchedulerOutput, StepResult
from penstock.scheduler import Scheduler

EMBED = PoolingParams(kind="embed")
BUDGET = CONFIG.max_num_batched_tokens


def encoder(**changes: object) -> Scheduler:
    kv = KVCacheManager(CacheConfig(block_size=4, num_blocks=0, enable_prefix_caching=False))
    return Scheduler(msgspec.structs.replace(CONFIG, is_encoder=True, pools_every_token=True, **changes), kv)


def result_of(output: SchedulerOutput) -> StepResult:
    pooled = {share.request_id: share.request_id.encode() for share in output.scheduled}
    return StepResult(output.step_id, {}, {}, {}, 0.01, pooled)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=8),
    depth=st.integers(0, 1),
    max_preemptions=st.integers(0, 1),
    max_num_seqs=st.integers(1, 8),
)
def test_texts_run_whole(lengths: list[int], depth: int, max_preemptions: int, max_num_seqs: int) -> None:
    scheduler = encoder(max_preemptions=max_preemptions, max_num_seqs=max_num_seqs)
    for index, length in enumerate(lengths):
        scheduler.add(request_of(str(index), [7] * length, 1, pooling=EMBED), 0.0)
    in_flight: list[SchedulerOutput] = []
    ended: list[str] = []
    for _ in range(40):
        output = scheduler.schedule(0.0)
        if output is not None:
            in_flight.append(output)
            assert output.num_tokens <= BUDGET
            for share in output.scheduled:
                assert (share.num_computed_tokens, share.samples, share.new_block_ids) == (0, True, [])
                assert share.num_tokens == lengths[int(share.request_id)]
        while len(in_flight) > (depth if output is not None else 0):
            step = in_flight.pop(0)
            for done in scheduler.update(step, result_of(step), 0.0):
                assert (done.finish_reason, done.pooled) == (FinishReason.STOP, done.request_id.encode())
                ended.append(done.request_id)
        scheduler.check()
    assert ended == [str(index) for index in range(len(lengths))]
    assert not scheduler.has_work()


def test_a_vector_that_does_not_come_is_an_error() -> None:
    scheduler = encoder()
    scheduler.add(request_of("a", [7, 8], 1, pooling=EMBED), 0.0)
    output = scheduler.schedule(0.0)
    assert output is not None
    [done] = scheduler.update(output, StepResult(output.step_id, {}, {}, {}, 0.01), 0.0)
    assert done.finish_reason is FinishReason.ERROR


def test_a_decoders_one_pass_request_is_prefilled_in_chunks_to_the_whole_context() -> None:
    scheduler, kv = scheduler_of(num_blocks=16)
    scheduler.add(request_of("a", [7] * 64, 1, pooling=EMBED), 0.0)  # all of max_model_len: nothing is drawn
    sizes = []
    while True:
        output = scheduler.schedule(0.0)
        assert output is not None
        [share] = output.scheduled
        sizes.append(share.num_tokens)
        pooled = {"a": b"vector"} if share.samples else {}
        outputs = scheduler.update(output, StepResult(output.step_id, {}, {}, {}, 0.01, pooled), 0.0)
        if outputs:
            break
    assert sizes == [BUDGET] * 4
    assert (outputs[0].pooled, outputs[0].finish_reason) == (b"vector", FinishReason.STOP)
    assert kv.num_available == kv.num_blocks
