"""Pinned prefixes are evicted after everything else, until their time is over, and never keep a request out."""

from __future__ import annotations

from tests.scheduler.scheduling import CONFIG

from penstock.config.engine import CacheConfig
from penstock.kvcache import BlockTable, KVCacheManager, encode_tokens
from penstock.messages import EngineRequest, SamplingParams, StepResult
from penstock.messages.step import SampledTokens
from penstock.scheduler import Scheduler

PINNED = list(range(100, 112))


def manager_of(num_blocks: int) -> KVCacheManager:
    return KVCacheManager(CacheConfig(block_size=4, num_blocks=num_blocks, enable_prefix_caching=True))


def start(kv: KVCacheManager, tokens: list[int]) -> BlockTable:
    table = kv.allocate(kv.match_prefix(encode_tokens(tokens)), len(tokens))
    assert table is not None
    return table


def run(kv: KVCacheManager, tokens: list[int], pin_tokens: int = 0, ttl_s: float = 0.0, now: float = 0.0) -> None:
    table = start(kv, tokens)
    kv.take_copies()
    kv.free(table, tokens, len(tokens), [(pin_tokens, ttl_s)] if pin_tokens else (), now)
    kv.check()


def num_cached(kv: KVCacheManager, tokens: list[int]) -> int:
    match = kv.match_prefix(encode_tokens([*tokens, 0]))
    kv.release(match)
    return match.num_tokens


def fill(kv: KVCacheManager, num_requests: int, first: int = 1000, now: float = 0.0) -> None:
    for index in range(num_requests):
        run(kv, [first + 10 * index + offset for offset in range(8)], now=now)


def test_a_pinned_prefix_outlives_what_was_used_after_it() -> None:
    kv = manager_of(8)
    run(kv, [*PINNED, 1, 2, 3, 4], pin_tokens=len(PINNED), ttl_s=60.0)
    fill(kv, 20)
    assert num_cached(kv, PINNED) == 12
    assert num_cached(kv, [*PINNED, 1, 2, 3, 4]) == 12, "what came behind it is not pinned"


def test_when_its_time_is_over_it_is_evicted_like_any_other() -> None:
    kv = manager_of(8)
    run(kv, PINNED, pin_tokens=12, ttl_s=60.0)
    run(kv, PINNED, pin_tokens=12, ttl_s=60.0, now=30.0)
    fill(kv, 20, now=61.0)
    assert num_cached(kv, PINNED) == 12, "a later use prolongs it"
    fill(kv, 20, first=5000, now=90.0)
    assert num_cached(kv, PINNED) == 0


def test_pins_never_keep_a_request_out() -> None:
    kv = manager_of(8)
    for index in range(4):
        run(kv, [index * 100 + offset for offset in range(8)], pin_tokens=8, ttl_s=1e9)
    assert kv.num_available == 8
    run(kv, list(range(7000, 7032)))
    assert [num_cached(kv, [index * 100 + offset for offset in range(8)]) for index in range(4)] == [0] * 4
    assert kv.stats().num_cached_blocks == 8


def test_the_least_recently_used_pin_goes_first() -> None:
    kv = manager_of(8)
    for index in range(4):
        run(kv, [index * 100 + offset for offset in range(8)], pin_tokens=8, ttl_s=1e9)
    run(kv, [1, *range(1, 8)])
    run(kv, list(range(7000, 7016)))
    assert num_cached(kv, list(range(300, 308))) == 8
    assert num_cached(kv, list(range(8))) == 0


def test_the_scheduler_pins_what_a_request_asks_for() -> None:
    cache = CacheConfig(block_size=4, num_blocks=8, enable_prefix_caching=True)
    kv = KVCacheManager(cache)
    scheduler = Scheduler(CONFIG, kv)

    def serve(request_id: str, prompt: list[int], now: float, pins: tuple[tuple[int, float], ...] = ()) -> None:
        scheduler.add(EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(),
                                    max_tokens=1, pins=pins), now)  # fmt: skip
        output = scheduler.schedule(now)
        assert output is not None
        sampled = {request_id: SampledTokens([9])}
        scheduler.update(output, StepResult(output.step_id, sampled, {}, {}, 0.01), now)
        scheduler.check()

    serve("pinned", [*PINNED, 5], 0.0, pins=((12, 300.0),))
    for index in range(12):
        serve(f"other{index}", [2000 + 10 * index + offset for offset in range(9)], 10.0 + index)
    assert num_cached(kv, PINNED) == 12
    for index in range(12):
        serve(f"later{index}", [5000 + 10 * index + offset for offset in range(9)], 301.0 + index)
    assert num_cached(kv, PINNED) == 0
