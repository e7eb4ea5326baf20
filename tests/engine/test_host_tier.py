"""The KV cache's host tier: what a small pool gives up comes back, bit for bit, instead of being computed again."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from delayed_device import DelayedBackend, delayed_device
from penstock.base.errors import ConfigError
from penstock.config.engine import CacheConfig, EngineConfig
from penstock.config.model import ModelConfig
from penstock.config.resolve import EngineOptions, MachineFacts, resolve_engine_config
from penstock.engine.core import EngineCore
from penstock.kernels.layouts import HostLayouts, Layouts
from penstock.kernels.triton.layouts import TritonLayouts
from penstock.loader import read_model_config
from penstock.messages import BlockCopy, SchedulerOutput
from penstock.runner import host_blocks, model_runner
from penstock.runner.host_blocks import HostBlocks
from penstock.runner.kv_pool import KVPool
from penstock.runner.step_device import HostBackend
from whole_engine import Finished, build, engine_config, request, run

NUM_CONVERSATIONS, NUM_TURNS = 6, 4


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ModelConfig:
    return read_model_config(checkpoint)


def with_tier(config: EngineConfig, num_host_blocks: int) -> EngineConfig:
    return msgspec.structs.replace(config, cache=msgspec.structs.replace(config.cache, num_host_blocks=num_host_blocks))


def converse(core: EngineCore, concurrency: int) -> list[tuple[list[int], object]]:
    """Every turn of a conversation repeats what was said before; conversations take turns. What was drawn."""
    source = random.Random(4)
    said = [[source.randrange(3, 200) for _ in range(40)] for _ in range(NUM_CONVERSATIONS)]
    drawn: list[tuple[list[int], object]] = []
    for turn in range(NUM_TURNS):
        requests = [
            request(f"{turn}-{index}", tokens, 12, logprobs=0, temperature=0.9 * (index % 2), seed=index)
            for index, tokens in enumerate(said)
        ]
        finished: dict[str, Finished] = run(core, requests, concurrency)
        for index, tokens in enumerate(said):
            result = finished[f"{turn}-{index}"]
            drawn.append((result.token_ids, result.logprobs))
            tokens += result.token_ids + [source.randrange(3, 200) for _ in range(17)]
    core.check()
    return drawn


def num_prefilled(core: EngineCore) -> int:
    stats = core.stats()
    assert stats.num_invariant_violations == 0
    return stats.num_prompt_tokens - stats.num_cached_prompt_tokens


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("is_delayed", [False, True])
def test_a_small_pool_with_a_tier_answers_as_a_big_pool_does(checkpoint, monkeypatch, is_delayed, concurrency):
    big = build(engine_config(checkpoint))
    expected = converse(big, concurrency)
    if is_delayed:
        backend = DelayedBackend()
        monkeypatch.setattr(model_runner, "step_device", lambda config, _device: delayed_device(config, backend))
    small = engine_config(checkpoint, num_blocks=34)
    without = build(small)
    assert converse(without, concurrency) == expected
    tiered = build(with_tier(small, 200))
    assert converse(tiered, concurrency) == expected
    stats = tiered.stats()
    assert stats.num_host_hit_tokens > 0
    assert stats.num_restored_blocks * 16 >= stats.num_host_hit_tokens
    assert stats.num_offloaded_blocks >= stats.num_restored_blocks
    assert num_prefilled(tiered) < 0.7 * num_prefilled(without)
    assert num_prefilled(tiered) <= num_prefilled(big) + 16 * NUM_CONVERSATIONS * NUM_TURNS  # whole blocks only
    assert without.stats().num_host_hit_tokens == 0


def test_preempted_requests_come_back_from_the_host(checkpoint, backend):
    """Blocks run out while requests decode: those set back lose their blocks, and get them back."""
    source = random.Random(7)
    requests = [request(str(index), [source.randrange(3, 200) for _ in range(50)], 60) for index in range(8)]
    expected = {name: each.token_ids for name, each in run(build(engine_config(checkpoint)), requests, 8).items()}
    small = with_tier(engine_config(checkpoint, num_blocks=24), 100)
    core = build(small)
    finished = run(core, requests, 8)
    assert {name: each.token_ids for name, each in finished.items()} == expected
    assert sum(each.num_preemptions for each in finished.values()) > 0
    assert core.stats().num_restored_blocks > 0


def test_copies_go_on_beside_a_step_that_does_not_need_them(checkpoint, backend):
    """While a stream decodes, a request whose prefix is on the host starts one step later, with the copy made."""
    core = build(with_tier(engine_config(checkpoint, num_blocks=20), 50))
    first = [7, *range(20, 119)]
    run(core, [request("first", first, 2)], 1)
    run(core, [request("other", [*range(15, 195), *range(80, 140)], 60)], 1)
    assert core.stats().num_host_cached_blocks == 5  # its first block is still on the device
    assert core.add(request("stream", [5, 6, 7], 40)) is None
    for _ in range(4):
        core.step()
    backend.log.clear()
    assert core.add(request("again", first, 2)) is None
    core.step()  # plans and launches the copies, with a step of the stream alone
    assert "_load" not in backend.log
    core.step()  # the next one waits for them
    assert backend.log.count("_load") == 1
    assert core.stats().num_host_hit_tokens == 80
    while core.has_work():
        core.step()
        core.scheduler.check()


class OrderedBackend(HostBackend):
    """Notes what work beside the steps is told to wait for, as the number of steps that had been given before."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.num_steps = 0
        self.waits: list[int] = []

    def event(self) -> OrderedEvent:
        return OrderedEvent(self)

    def beside(self, work: Callable[[], None], after: OrderedEvent) -> OrderedEvent:
        self.waits.append(after.num_steps)
        return super().beside(work, after)


class OrderedEvent:
    def __init__(self, backend: OrderedBackend) -> None:
        self._backend = backend
        self.num_steps = -1

    def record(self) -> None:
        self.num_steps = self._backend.num_steps

    def synchronize(self) -> None: ...

    def wait(self) -> None: ...


def plan(step_id: int, offloads: list[tuple[int, int]], restores: list[tuple[int, int]]) -> SchedulerOutput:
    return SchedulerOutput(
        step_id, [], [], [], [], 0, [BlockCopy(*pair) for pair in offloads], [BlockCopy(*pair) for pair in restores]
    )


def test_what_leaves_does_not_wait_for_the_step_before_and_what_returns_does(model):
    backend = OrderedBackend()
    blocks = HostBlocks(KVPool(model, 8, torch.float32, HostLayouts()), 4, backend)
    for step in range(1, 6):
        blocks.begin(plan(step, [(step, 0)], [(0, step + 1)]))
        backend.num_steps += 1
    assert backend.waits == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("layouts", [HostLayouts(), TritonLayouts(torch.device("cpu"))])
def test_blocks_come_back_bit_for_bit(monkeypatch, model, layouts: Layouts, dtype: torch.dtype):
    """In pieces smaller than a step's copies, over slabs of few slots, into other blocks than they left."""
    pool = KVPool(model, 12, dtype, layouts)
    memory = pool.by_block()
    nbytes = memory[0].numel() * 8
    monkeypatch.setattr(host_blocks, "SLAB_NBYTES", 4 * nbytes)
    monkeypatch.setattr(host_blocks, "STAGING_NBYTES", 3 * nbytes)
    blocks = HostBlocks(pool, 10, HostBackend(torch.device("cpu")))
    memory.random_(-(2**60), 2**60)
    contents = [[tensor[block].clone().view(torch.uint8) for tensor in pool.tensors] for block in range(12)]
    sources, slots = [5, 0, 11, 3, 7, 2, 9], [2, 3, 4, 5, 9, 0, 1]
    blocks.begin(plan(1, list(zip(sources, slots, strict=True)), []))
    memory.fill_(-1)
    destinations = [1, 2, 3, 4, 5, 6, 7]
    blocks.begin(plan(2, [], list(zip(slots, destinations, strict=True))))
    for source, destination in zip(sources, destinations, strict=True):
        for tensor, content in zip(pool.tensors, contents[source], strict=True):
            assert torch.equal(tensor[destination].view(torch.uint8), content)
    assert bool((memory[[0, 8, 9, 10, 11]] == -1).all()), "a block was written that nobody asked for"


def test_a_tier_needs_a_device_that_is_not_the_host(model):
    def resolved(device: str, host_kv_memory: int | None) -> CacheConfig:
        options = EngineOptions(device=device, host_kv_memory=host_kv_memory)
        return resolve_engine_config("", model, options, MachineFacts(num_cores=1)).cache

    assert resolved("cpu", None).host_memory_bytes == 0
    assert resolved("cuda", None).host_memory_bytes is None
    assert resolved("cuda", 0).host_memory_bytes == 0
    assert resolved("cuda", 1 << 33).host_memory_bytes == 1 << 33
    for device in ("cpu", "mps"):
        with pytest.raises(ConfigError, match="host-kv-memory"):
            resolved(device, 1 << 33)
