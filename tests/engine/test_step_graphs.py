"""Steps that are replayed give what launched ones give: with every kind of request, aborts, preemption and failures."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch

from delayed_device import DelayedBackend
from penstock.config.engine import EngineConfig
from penstock.engine.core import EngineCore
from penstock.kernels import ops as op_table
from penstock.loader.package import read_graph_shapes
from penstock.messages import EngineRequest, GrammarSpec, SamplingParams
from penstock.runner import ModelRunner, graph_policy
from penstock.runner.loading import write_package
from varied_requests import KINDS, SCHEDULES, make_requests, run_with_aborts, signature
from whole_engine import build, engine_config, request, run


@pytest.fixture
def backend(backend: DelayedBackend, monkeypatch: pytest.MonkeyPatch) -> DelayedBackend:
    """Engines built after this also capture a shape when it is used for the second time."""
    monkeypatch.setattr(graph_policy, "MIN_USES", 2)
    monkeypatch.setattr(graph_policy, "STEPS_APART", 1)
    return backend


def caches_of(core: EngineCore) -> list[torch.Tensor]:
    runner = core.executor.runner
    assert isinstance(runner, ModelRunner)
    return runner._pool.tensors


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_every_request_gets_what_it_gets_on_the_cpu(checkpoint, backend, monkeypatch, schedule):
    config = engine_config(checkpoint, **SCHEDULES[schedule])
    requests = make_requests(list(KINDS), 18, 24)
    core = build(config)
    replayed = run(core, requests, 12)
    captures = core.stats().captures
    assert captures.num_captured >= 2
    assert captures.num_failed == 0
    assert captures.num_replayed == backend.log.count("replay") >= 10
    if schedule != "batched":
        assert captures.num_replayed > captures.num_launched
    monkeypatch.undo()
    assert signature(replayed) == signature(run(build(config), requests, 12))


def test_grammars_and_their_jumps_are_the_same(backend, monkeypatch):
    from penstock import LLM

    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    grammar = GrammarSpec.json_schema(schema)
    wishes = [
        SamplingParams(max_tokens=24, temperature=1.5, seed=index, grammar=grammar if index % 2 else None, logprobs=1)
        for index in range(6)
    ]

    def answers() -> list[tuple[str, object]]:
        with LLM(max_num_seqs=8, max_memory=256 << 20) as llm:
            completions = llm.generate([f"number {index}" for index in range(6)], wishes)
            return [(each.outputs[0].text, each.outputs[0].logprobs) for each in completions]

    replayed = answers()
    assert "replay" in backend.log
    monkeypatch.undo()
    assert replayed == answers()


def test_an_abort_with_a_replay_under_way_leaves_the_others_alone(checkpoint, backend, monkeypatch):
    config = engine_config(checkpoint, max_num_seqs=3)
    requests = make_requests(["greedy", "seeded"], 8, 20)

    aborts = dict.fromkeys((8, 15), requests[1].request_id)
    replayed = run_with_aborts(build(config), requests, aborts)
    assert "replay" in backend.log
    monkeypatch.undo()
    now = run_with_aborts(build(config), requests, aborts)
    aborted = {requests[1].request_id}
    assert {name: each for name, each in replayed.items() if name not in aborted} == {
        name: each for name, each in now.items() if name not in aborted
    }


def test_neither_a_capture_nor_padding_writes_a_block(checkpoint, backend, monkeypatch):
    monkeypatch.setattr(graph_policy, "STEPS_APART", 10**9)  # only while idle
    core = build(engine_config(checkpoint))
    run(core, make_requests(["greedy"], 9, 6), 9)
    for cache in caches_of(core):
        cache.normal_()  # every block holds something
    before = [cache.clone() for cache in caches_of(core)]
    assert core.prepare()
    while core.prepare():
        pass
    assert all(torch.equal(now, then) for now, then in zip(caches_of(core), before, strict=True))
    # One short request alone, in a shape for more: only the blocks that it was given change.
    assert core.stats().captures.num_replayed == 0
    [captured] = [shape for shape in core.executor.runner._graphs._policy.captured if shape.is_decode]
    assert captured.num_tokens == 16
    run(core, [request(f"{index}", [5, 6, 7], 4) for index in range(8)], 8)
    assert core.stats().captures.num_replayed > 0
    changed = {
        block
        for now, then in zip(caches_of(core), before, strict=True)
        for block in (now != then).flatten(1).any(1).nonzero().flatten().tolist()
    }
    assert len(changed) == 8


def test_a_failed_capture_is_logged_and_nothing_else(checkpoint, backend, monkeypatch, caplog):
    backend.failures = [RuntimeError("operation not permitted when stream is capturing") for _ in range(9)]
    config = engine_config(checkpoint)
    requests = make_requests(list(KINDS), 12, 16)
    core = build(config)
    finished = run(core, requests, 12)
    captures = core.stats().captures
    assert captures.num_failed == 9 - len(backend.failures) >= 1
    assert captures.num_captured == captures.num_replayed == 0
    assert caplog.text.count("cannot be captured") == captures.num_failed
    monkeypatch.undo()
    assert signature(finished) == signature(run(build(config), requests, 12))


def test_nothing_is_captured_before_the_engine_is_ready_nor_where_it_is_switched_off(checkpoint, backend):
    core = build(engine_config(checkpoint))
    assert "record" not in backend.log
    assert not core.prepare()
    core = build(msgspec.structs.replace(engine_config(checkpoint), capture_graphs=False))
    run(core, make_requests(["greedy"], 4, 20), 4)
    assert not core.prepare()
    assert core.stats().captures.num_captured == 0
    assert "record" not in backend.log


def test_an_idle_engine_captures_what_was_used_and_time_is_counted(checkpoint, backend, monkeypatch):
    monkeypatch.setattr(graph_policy, "STEPS_APART", 10**9)
    core = build(engine_config(checkpoint))
    source = random.Random(1)
    requests: list[EngineRequest] = [
        request(f"{index}", [source.randrange(3, 90) for _ in range(5)], 12) for index in range(3)
    ]
    run(core, requests, 3)
    assert core.stats().captures.num_captured == 0
    while core.prepare():
        pass
    captures = core.stats().captures
    assert captures.num_captured >= 1
    assert captures.seconds > 0
    assert captures.nbytes == captures.num_captured << 20
    assert captures.num_waiting == 0


def packaged(checkpoint: Path, output: Path) -> EngineConfig:
    """A package of the checkpoint, and an engine's configuration for it."""
    config = engine_config(checkpoint)
    output.mkdir()
    write_package(config, op_table.load("native", 2), output, lambda _fraction: None)
    (output / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    return msgspec.structs.replace(config, model_path=str(output))


def test_what_an_engine_captured_the_next_captures_before_it_is_used(checkpoint, backend, tmp_path):
    config = packaged(checkpoint, tmp_path / "package")
    assert read_graph_shapes(tmp_path / "package") == [], "a CPU's package names none"
    core = build(config)
    run(core, make_requests(["greedy"], 4, 20), 4)
    kept = read_graph_shapes(tmp_path / "package")
    assert len(kept) == core.stats().captures.num_captured >= 1
    again = build(config)
    assert again.stats().captures.num_captured == 0, "ready first"
    assert again.prepare()
    while again.prepare():
        pass
    assert again.stats().captures.num_captured == len(kept)
    assert read_graph_shapes(tmp_path / "package") == kept


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[[1,2]]", b'[["a",1,1]]', b"[[-1,0,5]]", b"[" * 2000, b"[[4,4,32]" + b" " * (1 << 17)]
)
def test_a_damaged_list_of_shapes_is_passed_over(checkpoint, backend, tmp_path, content):
    config = packaged(checkpoint, tmp_path / "package")
    (tmp_path / "package" / "graphs.json").write_bytes(content)
    core = build(config)
    assert not core.prepare()
    assert len(run(core, make_requests(["greedy"], 2, 4), 2)) == 2


def test_a_package_that_cannot_be_written_to_is_served(checkpoint, backend, tmp_path, monkeypatch):
    config = packaged(checkpoint, tmp_path / "package")

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    core = build(config)
    run(core, make_requests(["greedy"], 4, 20), 4)
    assert core.stats().captures.num_captured >= 1
    assert not (tmp_path / "package" / "graphs.json").exists()
