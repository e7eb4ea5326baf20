"""Runs engine requests through a whole engine in process: scheduler, cache, executor, runner, model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from penstock.config.engine import CacheConfig, EngineConfig, SchedulerConfig
from penstock.engine.build import build_engine
from penstock.engine.core import EngineCore
from penstock.loader import read_model_config
from penstock.messages import EngineRequest, FinishReason, RequestOutput, SamplingParams, TokenLogprobs


@dataclass
class Finished:
    """All that one request gave."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    last: RequestOutput | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.last.finish_reason if self.last is not None else None

    @property
    def num_preemptions(self) -> int:
        assert self.last is not None
        assert self.last.timings is not None
        return self.last.timings.num_preemptions


def engine_config(
    path: Path,
    *,
    num_blocks: int = 512,
    max_num_seqs: int = 32,
    max_num_batched_tokens: int = 2048,
    max_model_len: int = 512,
    prefix_caching: bool = True,
    kernels: str = "native",
    dtype: str = "float32",
) -> EngineConfig:
    """An EngineConfig for a checkpoint on disk, with a pool of exactly `num_blocks`."""
    model = read_model_config(path)
    return EngineConfig(
        model_path=str(path), model=model, load_format="safetensors", dtype=dtype, seed=0, num_threads=2,
        kernels=kernels, max_memory_bytes=4 << 30,
        cache=CacheConfig(block_size=16, num_blocks=num_blocks, enable_prefix_caching=prefix_caching),
        scheduler=SchedulerConfig(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len,
            max_num_queued_requests=10_000, max_num_queued_tokens=10**9, watermark_blocks=1, max_preemptions=1_000,
        ),
    )  # fmt: skip


def build(config: EngineConfig) -> EngineCore:
    core, _ = build_engine(config, lambda _phase, _fraction: None)
    return core


def request(request_id: str, prompt: Sequence[int], max_tokens: int, **sampling: object) -> EngineRequest:
    """A request that decodes to its length; greedy unless `sampling` says otherwise."""
    parameters = SamplingParams(**{"temperature": 0.0, "seed": 0, **sampling})
    return EngineRequest(
        request_id=request_id, prompt_token_ids=list(prompt), sampling=parameters, max_tokens=max_tokens
    )


def run(core: EngineCore, requests: Sequence[EngineRequest], concurrency: int) -> dict[str, Finished]:
    """Runs all requests, at most `concurrency` at a time, checking the invariants after every step."""
    waiting = list(reversed(requests))
    finished = {request.request_id: Finished() for request in requests}
    num_open = 0
    while waiting or num_open:
        while waiting and num_open < concurrency:
            refusal = core.add(waiting.pop())
            assert refusal is None, refusal
            num_open += 1
        for output in core.step():
            collected = finished[output.request_id]
            collected.token_ids += output.token_ids
            collected.logprobs += output.logprobs or []
            if output.prompt_logprobs is not None:
                assert collected.prompt_logprobs is None
                collected.prompt_logprobs = output.prompt_logprobs
            if output.finish_reason is not None:
                assert collected.last is None, "a second final output"
                assert output.error is None, output.error
                collected.last = output
                num_open -= 1
        core.scheduler.check()
    return finished
