"""Vectors and scores on a device that works by itself: read back when the next step was launched, and the same bits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import write_checkpoint
from delayed_device import DelayedBackend, NothingIsReadBack
from penstock.messages import EngineRequest, FinishReason, PoolingParams, SamplingParams
from penstock.runner.pooling import Pooler
from varied_requests import make_requests
from whole_engine import build, engine_config, run

EMBED = PoolingParams(kind="embed")


def one_pass(request_id: str, length: int, pooling: PoolingParams = EMBED) -> EngineRequest:
    source = random.Random(request_id)
    prompt = [source.randrange(3, 211) for _ in range(length)]
    return EngineRequest(
        request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(), max_tokens=1, pooling=pooling
    )


def texts(pooling: PoolingParams = EMBED) -> list[EngineRequest]:
    """Some take several steps; some fit one together."""
    return [one_pass(f"text-{index}", length, pooling) for index, length in enumerate((3, 90, 17, 40, 1, 64, 33, 90))]


def answers(path: Path, requests: list[EngineRequest], **options: Any) -> dict[str, object]:
    core = build(engine_config(path, **options))
    finished = run(core, requests, 5)
    assert all(one.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for one in finished.values())
    return {name: (one.token_ids, one.last.pooled if one.last else None) for name, one in finished.items()}


@pytest.fixture
def nothing_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pooler.pool

    def watched(*args: Any) -> Any:
        with NothingIsReadBack():
            return pool(*args)

    monkeypatch.setattr(Pooler, "pool", watched)


@pytest.mark.usefixtures("nothing_is_awaited")
@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_are_those_of_the_cpu(
    family: str, normalize: bool, tmp_path: Path, backend: DelayedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, family)
    options = {"max_model_len": 96, "max_num_batched_tokens": 48 if family == "llama" else 96}
    requests = texts(PoolingParams(kind="embed", normalize=normalize, dimensions=40))
    if family == "llama":
        requests += make_requests(["greedy"], 3, 9)  # tokens are drawn in the same steps
    late = answers(tmp_path, requests, **options)
    assert "down" in backend.log
    monkeypatch.undo()
    assert late == answers(tmp_path, requests, **options)


@pytest.mark.usefixtures("nothing_is_awaited")
def test_scores_are_those_of_the_cpu(tmp_path: Path, backend: DelayedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, "bert", head="ForSequenceClassification", num_labels=3)
    requests = texts(PoolingParams(kind="classify"))
    late = answers(tmp_path, requests, max_model_len=96, max_num_batched_tokens=96)
    assert "down" in backend.log
    monkeypatch.undo()
    assert late == answers(tmp_path, requests, max_model_len=96, max_num_batched_tokens=96)


def test_the_next_step_is_launched_before_vectors_are_there(checkpoint: Path, backend: DelayedBackend) -> None:
    core = build(engine_config(checkpoint, max_num_batched_tokens=48))
    run(core, [one_pass(str(index), 40) for index in range(12)], 12)
    waits = [place for place, what in enumerate(backend.log) if what == "down"]
    assert len(waits) == 10
    # Up to each wait, the tables and the indices of one step more than were waited for.
    for waited, place in enumerate(waits[:-1]):
        assert backend.log[:place].count("up") == 2 * (waited + 2)


def test_a_vector_without_usable_numbers_fails_its_request_alone(
    checkpoint: Path, backend: DelayedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Pooler._finished

    def spoiled(self: Pooler, vector: torch.Tensor, params: PoolingParams) -> torch.Tensor:
        return finish(self, vector, params) * (torch.nan if params.dimensions == 7 else 1.0)

    monkeypatch.setattr(Pooler, "_finished", spoiled)
    core = build(engine_config(checkpoint, max_num_batched_tokens=48))
    for one in [*texts(), one_pass("bad", 20, PoolingParams(kind="embed", dimensions=7))]:
        assert core.add(one) is None
    ends = {}
    while len(ends) < 9:
        ends |= {output.request_id: output.finish_reason for output in core.step()}
    assert ends.pop("bad") is FinishReason.ERROR
    assert set(ends.values()) == {FinishReason.STOP}
    assert "down" in backend.log
