"""The largest step is run before the KV cache is made, and no later step asks for more than it did.

The device is acted out on the CPU; every tensor that torch makes while it is counted lies on it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoints import write_checkpoint
from delayed_device import DelayedBackend, delayed_device
from penstock.base.errors import MemoryPlanError
from penstock.config.engine import EngineConfig
from penstock.engine import build as engine_build
from penstock.engine.core import EngineCore
from penstock.engine.executor import StreamExecutor
from penstock.kvcache import KVCacheManager
from penstock.messages import EngineRequest, PoolingParams, SchedulerOutput
from penstock.runner import ModelRunner, memory, model_runner, plan_memory, plan_profiled, profile
from penstock.runner.profile import PROBE_BLOCKS, largest_step, run_largest_steps
from penstock.sampling import deferred
from penstock.scheduler import Scheduler
from whole_engine import engine_config, request, run

GIB = 1 << 30


class CountingMemory(TorchDispatchMode):
    """Counts the bytes of storages that operations make and that are still alive; what is pinned is the host's."""

    def __init__(self, backend: DelayedBackend) -> None:
        super().__init__()
        self._backend = backend
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._is_paused = False
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_paused:
            given = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and id(tensor) not in given:
                    self._note(tensor.untyped_storage())
            self.peak = max(self.peak, self.taken())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage.data_ptr() not in self._backend.pinned_memory and storage._cdata not in self._alive:
            self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def taken(self) -> int:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self._alive.values())

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._is_paused, before = True, self._is_paused
        yield
        self._is_paused = before


class CountedBackend(DelayedBackend):
    """What it does to act the device out is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = CountingMemory(self)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with self.memory.paused():
            return super().pinned(shape, dtype)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        with self.memory.paused():
            super().copy(destination, source)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path)
    return path


def hostile_requests(config: EngineConfig, *, penalised: bool) -> list[EngineRequest]:
    """More than run at once; prompts up to the longest, everything that makes a step larger."""
    source = random.Random(1)
    longest, vocab_size = config.scheduler.max_model_len, config.model.vocab_size
    requests = []
    for index in range(30):
        length = source.choice([1, 8, 60, longest - 12]) if not penalised else longest - 12
        prompt = [(position * 7 + index) % (vocab_size - 3) + 3 for position in range(length)]
        wishes: dict[str, object] = {"repetition_penalty": 1.2, "presence_penalty": 0.5} if penalised else {}
        if index % 2:
            wishes |= {"logprobs": 20, "temperature": 1.0, "logit_bias": dict.fromkeys(range(200), 1.0)}
        if index % 3 == 0:
            wishes |= {"min_tokens": 2, "bad_words_token_ids": ((3,), (4, 5))}
        if index % 5 == 0:
            wishes |= {"prompt_logprobs": 20}
        if index % 7 == 0 and not penalised:
            wishes |= {"dry_multiplier": 0.8, "mirostat": 2}
        requests.append(request(f"r{index}", prompt, 10, **wishes))
    for index in range(6):
        vector = EngineRequest(
            request_id=f"v{index}", prompt_token_ids=[5] * 90, sampling=requests[0].sampling, max_tokens=1,
            pooling=PoolingParams(kind="embed"),
        )  # fmt: skip
        requests.append(vector)
    source.shuffle(requests)
    return requests


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("limits", [(12, 128), (3, 64), (12, 16)], ids=str)
def test_no_step_asks_for_more_than_the_largest_did(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], penalised: bool
) -> None:
    if not penalised:
        monkeypatch.setattr(profile, "MOST_PENALISED", 0)  # what is held for penalties would hide the rest
    num_seqs, num_tokens = limits
    config = engine_config(
        checkpoint, max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens, max_model_len=256, dtype="bfloat16"
    )
    config = msgspec.structs.replace(config, capture_graphs=False)
    first = msgspec.structs.replace(config, cache=msgspec.structs.replace(config.cache, num_blocks=PROBE_BLOCKS))
    backend = CountedBackend()
    runner = ModelRunner(first, lambda _phase, _fraction: None, device=delayed_device(config, backend))
    runner.ops.recordings = None  # as a card's ops have it: all memory of their steps is torch's
    counted = backend.memory
    with counted:
        run_largest_steps(runner, config, torch.device("cpu"))
        assert counted.taken() < 0.1 * counted.peak, "the largest step left something behind"
        profiled = counted.peak
        runner.replace_pool(config.model, config.cache)
        kept, counted.peak = counted.taken(), 0
        core = EngineCore(Scheduler(config.scheduler, KVCacheManager(config.cache)), StreamExecutor(runner))
        finished = run(core, hostile_requests(config, penalised=penalised), 30)
    assert len(finished) == 36
    assert counted.peak - kept <= profiled
    if limits == (12, 128) and not penalised:
        assert counted.peak - kept > 0.85 * profiled, "the largest step is larger than any that is asked for"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> DelayedBackend:
    """A card of 3 GiB: the next engine is built for it, on the acted-out device."""
    backend = DelayedBackend()
    backend.card_bytes = 3 * GIB

    def planned(config: EngineConfig) -> memory.MemoryPlan:
        return msgspec.structs.replace(plan_memory(config), free_bytes=backend.card_bytes)

    monkeypatch.setattr(engine_build, "plan_memory", planned)
    monkeypatch.setattr(model_runner, "step_device", lambda config, _device: delayed_device(config, backend))
    return backend


def card_config(path: Path, **limits: int) -> EngineConfig:
    config = engine_config(path, num_blocks=0, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128, **limits)
    return msgspec.structs.replace(config, max_memory_bytes=0)


def test_the_cache_gets_what_the_largest_step_leaves(checkpoint: Path, card: DelayedBackend) -> None:
    card.taken_bytes = lambda: GIB
    core, ready = engine_build.build_engine(card_config(checkpoint), lambda _phase, _fraction: None)
    runner = core.executor.runner  # type: ignore[attr-defined]
    block_bytes = runner._pool.by_block()[0].numel() * 8
    logits = 4 * 4 * 300
    left = 2 * GIB - memory.LATER_BYTES - memory.GRAPH_BYTES
    assert left - logits - 4 * GIB / 1024 < ready.num_blocks * block_bytes <= left
    assert runner._pool.num_blocks == ready.num_blocks == core.scheduler.stats().num_blocks
    assert "run the largest step" in [name for name, _ in ready.phases]
    assert run(core, [request("r", [3, 4, 5], 4)], 1)["r"].finish_reason is not None


def test_a_card_without_room_for_the_cache_is_refused_with_what_helps(checkpoint: Path, card: DelayedBackend) -> None:
    card.taken_bytes = lambda: 2 * GIB
    with pytest.raises(MemoryPlanError, match=r"the largest step took 2\.00 GiB") as caught:
        engine_build.build_engine(card_config(checkpoint), lambda _phase, _fraction: None)
    assert "--max-num-batched-tokens" in str(caught.value)


def test_a_step_that_finds_no_room_is_refused_before_anybody_is_served(checkpoint, card, monkeypatch) -> None:
    def none_left(*_arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ModelRunner, "_forward", none_left)
    with pytest.raises(MemoryPlanError, match="no room for the largest step"):
        engine_build.build_engine(card_config(checkpoint), lambda _phase, _fraction: None)


def test_the_largest_step_is_as_large_as_a_step_may_be(checkpoint: Path) -> None:
    for num_seqs, num_tokens in ((4, 64), (64, 16), (1, 512), (3, 7)):
        config = engine_config(checkpoint, max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens, max_model_len=200)
        output = largest_step(config, None)
        assert len(output.scheduled) == len(output.new_requests) == min(num_seqs, num_tokens)
        assert output.num_tokens == sum(share.num_tokens for share in output.scheduled)
        assert output.num_tokens == min(num_tokens, num_seqs * 200)
        assert output.scheduled[0].num_computed_tokens + output.scheduled[0].num_tokens == 200
        assert len(output.scheduled[0].new_block_ids) == 13


def test_smaller_steps_follow_so_that_their_tiles_are_compiled(checkpoint: Path) -> None:
    tried: list[SchedulerOutput] = []

    class Runner:
        def try_out(self, output: SchedulerOutput) -> None:
            tried.append(output)

    config = engine_config(checkpoint, max_num_seqs=40, max_num_batched_tokens=300)
    run_largest_steps(Runner(), config, torch.device("cpu"))
    steps = [(output.num_tokens, len(output.scheduled)) for output in tried if output.new_requests[0].pooling is None]
    assert steps == [(300, 40), (16, 16), (32, 32), (64, 40)]
    tried.clear()
    config = engine_config(checkpoint, max_num_seqs=4, max_num_batched_tokens=20)
    run_largest_steps(Runner(), config, torch.device("cpu"))
    assert [output.num_tokens for output in tried if output.new_requests[0].pooling is None] == [20, 16]


def test_the_tiles_that_are_run_are_those_of_the_cards() -> None:
    from penstock.kernels.triton import configs

    for name in ("NVIDIA_H100.json", "NVIDIA_H200.json", "NVIDIA_A100.json", "NVIDIA_B200.json"):
        for tiles in configs.read(name).tiles.values():
            assert {tile.max_tokens for tile in tiles[:-1]} <= set(profile.TILE_TOKENS), name


def test_an_explicit_limit_bounds_what_everything_takes(checkpoint: Path) -> None:
    config = engine_config(checkpoint, num_blocks=0, max_model_len=128)
    plan = msgspec.structs.replace(plan_memory(config), free_bytes=100 * GIB)
    config = msgspec.structs.replace(config, max_memory_bytes=3 * GIB)
    found = plan_profiled(config, plan, GIB)
    assert found.kv_bytes + found.activation_bytes + found.weights_bytes <= 3 * GIB
    assert found.kv_bytes > 0.4 * GIB - 1


def test_penalties_of_long_contexts_are_applied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.kernels import ops as op_table
    from penstock.messages import SamplingParams
    from penstock.sampling import LogitEdits, RowEdits

    source, ops = random.Random(3), op_table.load("reference", 1)
    edits = []
    for row in range(6):
        token_ids = torch.randint(0, 90, (40,)).numpy()
        sampling = SamplingParams(repetition_penalty=1.0 + row / 10, presence_penalty=source.random())
        edit = LogitEdits.of(sampling, (), token_ids, 20, 100)
        assert edit is not None
        edits.append(RowEdits(row, edit, token_ids[20:]))
    logits = torch.randn(6, 100)
    whole, in_pieces = logits.clone(), logits.clone()
    deferred._apply_edits(whole, edits, ops, torch.from_numpy)
    assert not torch.equal(whole, logits)
    monkeypatch.setattr(deferred, "MOST_PENALISED", 50)
    deferred._apply_edits(in_pieces, edits, ops, torch.from_numpy)
    assert torch.equal(whole, in_pieces)
