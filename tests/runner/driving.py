"""Drives a ModelRunner by hand-made plans: a scheduler in miniature, without policy, with random block ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from penstock.config.engine import CacheConfig, EngineConfig, SchedulerConfig
from penstock.loader import read_model_config
from penstock.messages import (
    ErrorInfo,
    NewRequestData,
    SamplingParams,
    ScheduledRequest,
    SchedulerOutput,
    TokenLogprobs,
)
from penstock.runner import ModelRunner

BLOCK_SIZE = 16


def engine_config(path: Path, **overrides: Any) -> EngineConfig:
    """A small engine on the checkpoint at `path`. overrides: of EngineConfig, SchedulerConfig or CacheConfig."""
    cache = {"block_size": BLOCK_SIZE, "num_blocks": 256}
    scheduler = {
        "max_num_seqs": 40,
        "max_num_batched_tokens": 512,
        "max_model_len": 512,
        "max_num_queued_requests": 100,
        "max_num_queued_tokens": 100_000,
        "watermark_blocks": 0,
    }
    engine: dict[str, Any] = {
        "model_path": str(path),
        "model": read_model_config(path),
        "load_format": "safetensors",
        "dtype": "float32",
        "seed": 0,
        "num_threads": 1,
        "kernels": "native",
        "max_memory_bytes": 2 << 30,
        "max_model_len_is_auto": False,
        "quantization": None,
        "activations": None,
    }
    for name, value in overrides.items():
        [target] = [part for part in (cache, scheduler, engine) if name in part]
        target[name] = value
    return EngineConfig(cache=CacheConfig(**cache), scheduler=SchedulerConfig(**scheduler), **engine)


def make_runner(path: Path, **overrides: Any) -> ModelRunner:
    return ModelRunner(engine_config(path, **overrides), lambda phase, fraction: None)


class Driven(msgspec.Struct):
    """A request as the driver sees it."""

    request_id: str
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...] = ()
    num_computed: int = 0
    blocks: list[int] = []
    is_known: bool = False  # to the runner
    output: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    error: ErrorInfo | None = None


class Driver:
    """Runs sequences on a runner. chunk: most tokens of one sequence in a step; None for all at once."""

    def __init__(self, runner: ModelRunner, num_blocks: int = 256, seed: int = 0) -> None:
        self.runner = runner
        self.random = random.Random(seed)
        self.free = list(range(num_blocks))
        self.random.shuffle(self.free)
        self.removed: list[str] = []
        self.step_id = 0

    def start(
        self, request_id: str, prompt: Sequence[int], stop_token_ids: tuple[int, ...] = (), **sampling: Any
    ) -> Driven:
        params = SamplingParams(**{"temperature": 0.0, "seed": 0, **sampling})
        return Driven(request_id, list(prompt), len(prompt), params, stop_token_ids)

    def step(self, sequences: Sequence[Driven], chunk: int | None = None) -> None:
        """One step in which every sequence computes up to `chunk` of its tokens."""
        new, scheduled = [], []
        for sequence in sequences:
            if not sequence.is_known:
                new.append(
                    NewRequestData(
                        sequence.request_id,
                        list(sequence.tokens),
                        sequence.num_prompt,
                        sequence.sampling,
                        sequence.stop_token_ids,
                    )
                )
                sequence.is_known = True
            count = min(len(sequence.tokens) - sequence.num_computed, chunk or len(sequence.tokens))
            end = sequence.num_computed + count
            wanted = -(-end // BLOCK_SIZE) - len(sequence.blocks)
            blocks = [self.free.pop() for _ in range(max(wanted, 0))]
            sequence.blocks = sequence.blocks + blocks
            scheduled.append(
                ScheduledRequest(sequence.request_id, sequence.num_computed, count, blocks, end == len(sequence.tokens))
            )
            sequence.num_computed = end
        num_tokens = sum(request.num_tokens for request in scheduled)
        output = SchedulerOutput(self.step_id, scheduled, new, self.removed, [], num_tokens)
        self.removed = []
        self.step_id += 1
        result = self.runner.execute(output)
        for sequence in sequences:
            self._take(sequence, result)

    def _take(self, sequence: Driven, result: Any) -> None:
        sequence.prompt_logprobs = sequence.prompt_logprobs + result.prompt_logprobs.get(sequence.request_id, [])
        sequence.error = result.errors.get(sequence.request_id)
        sampled = result.sampled.get(sequence.request_id)
        if sampled is not None:
            sequence.tokens = sequence.tokens + sampled.token_ids
            sequence.output = sequence.output + sampled.token_ids
            sequence.logprobs = sequence.logprobs + (sampled.logprobs or [])

    def finish(self, sequence: Driven) -> None:
        """Frees the sequence, also to compute it anew (preemption): its tokens stay."""
        self.free.extend(sequence.blocks)
        self.random.shuffle(self.free)
        self.removed.append(sequence.request_id)
        sequence.blocks, sequence.num_computed, sequence.is_known = [], 0, False

    def generate(self, sequences: Sequence[Driven], max_tokens: int, chunk: int | None = None) -> None:
        """Steps all sequences together until each has `max_tokens` of output or an error."""
        running = list(sequences)
        while running:
            self.step(running, chunk)
            for sequence in running:
                if len(sequence.output) >= max_tokens or sequence.error is not None:
                    self.finish(sequence)
            running = [sequence for sequence in running if sequence.is_known]
