"""How long a step takes, from what is in it: fitted to measured steps, or from a machine's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.base.errors import ConfigError
from penstock.config.model import ModelConfig
from penstock.messages import SchedulerOutput

# Tokens a step at which the cost of one more changes: by then weights are read for one, then for a tile, and so on.
_KNEES: Final = (1, 4, 16, 64)
MIN_STEPS: Final = 30


class StepWork(msgspec.Struct, frozen=True, array_like=True):
    """What a step computes. num_tokens: rows of the linear layers. num_sampled: rows of the head.

    decode_context: keys read by rows of one token, summed. prefill_pairs: (query, key) pairs of longer chunks, summed.
    """

    num_tokens: int
    num_sampled: int
    decode_context: int
    prefill_pairs: int

    @classmethod
    def of(cls, output: SchedulerOutput) -> StepWork:
        num_sampled = decode_context = prefill_pairs = 0
        for share in output.scheduled:
            num_sampled += share.samples
            if share.num_tokens == 1:
                decode_context += share.num_computed_tokens + 1
            else:
                # Query i of the chunk sees num_computed_tokens + i + 1 keys.
                prefill_pairs += share.num_tokens * share.num_computed_tokens
                prefill_pairs += share.num_tokens * (share.num_tokens + 1) // 2
        return cls(output.num_tokens, num_sampled, decode_context, prefill_pairs)


class StepTime(Protocol):
    """seconds: of a step on the device. host_s: of Python between two steps, hidden while the device works.

    frontend_s: from a client's send to the engine, and from the engine to the client, together. error: median relative
    error of `seconds`.
    """

    @property
    def host_s(self) -> float: ...

    @property
    def frontend_s(self) -> float: ...

    @property
    def error(self) -> float: ...

    def seconds(self, work: StepWork) -> float: ...


class FittedStepTime(msgspec.Struct, frozen=True, kw_only=True):
    """A non-negative linear model of a step's parts. error: median relative error over the steps it was fitted to."""

    coefficients: list[float]
    host_s: float
    frontend_s: float
    error: float
    num_steps: int
    source: str = ""

    def seconds(self, work: StepWork) -> float:
        return sum(
            factor * feature for factor, feature in zip(self.coefficients, _features(work), strict=True) if factor
        )


def _features(work: StepWork) -> tuple[float, ...]:
    tokens = work.num_tokens
    beyond = [float(max(0, tokens - knee)) for knee in _KNEES]
    return (1.0, *beyond, float(work.num_sampled), float(work.decode_context), float(work.prefill_pairs))


def fit_step_time(
    steps: Sequence[tuple[StepWork, float]], host_s: float, frontend_s: float, source: str = ""
) -> FittedStepTime:
    """Least squares of the relative error, no coefficient below 0. Raises ConfigError when there are too few steps."""
    if len(steps) < MIN_STEPS:
        raise ConfigError(f"{len(steps)} steps are too few to fit a model.", remedy=f"Measure at least {MIN_STEPS}.")
    seconds = np.asarray([taken for _, taken in steps])
    features = np.asarray([_features(work) for work, _ in steps])
    coefficients = np.zeros(features.shape[1])
    weights = 1.0 / seconds
    for _ in range(3):  # steps that were disturbed from outside lose their say
        coefficients = _non_negative(features * weights[:, None], seconds * weights)
        error = np.abs(features @ coefficients / seconds - 1.0)
        weights = 1.0 / seconds / np.maximum(error / max(float(np.median(error)), 1e-3), 1.0)
    error = np.abs(features @ coefficients / seconds - 1.0)
    return FittedStepTime(
        coefficients=coefficients.tolist(), host_s=host_s, frontend_s=frontend_s, error=float(np.median(error)),
        num_steps=len(steps), source=source,
    )  # fmt: skip


def _non_negative(matrix: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Non-negative least squares: the worst negative coefficient is fixed at 0 until none is left."""
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    active = [index for index in range(matrix.shape[1]) if np.any(matrix[:, index])]
    found = np.zeros(matrix.shape[1])
    while active:
        part, *_ = np.linalg.lstsq(matrix[:, active] / scale[active], target, rcond=None)
        if part.min() >= 0:
            found[active] = part / scale[active]
            break
        active.pop(int(part.argmin()))
    return found


@dataclass(frozen=True)
class HardwareStepTime:
    """Of a machine that is not here, from its limits: each part takes what its bytes or its multiplications need.

    bandwidth: bytes a second. flops: multiplications and additions a second. efficiency: the share of both that a good
    kernel reaches. weight_bytes, num_parameters: of all layers and the head. kv_bytes: of one token, all layers.
    attention_flops: of one (query, key) pair, all layers.
    """

    bandwidth: float
    flops: float
    weight_bytes: float
    num_parameters: float
    kv_bytes: float
    attention_flops: float
    efficiency: float = 0.7
    host_s: float = 0.0005
    frontend_s: float = 0.002
    error: float = 0.3  # a guess: limits say what cannot be beaten, not what is reached

    @classmethod
    def of_model(cls, model: ModelConfig, bandwidth: float, flops: float, weight_bits: float = 16) -> HardwareStepTime:
        """A model with weights of that many bits on that machine."""
        attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim * model.hidden_size
        layer = attention + 3 * model.hidden_size * model.intermediate_size
        num_parameters = float(model.num_layers * layer + model.vocab_size * model.hidden_size)
        return cls(
            bandwidth=bandwidth, flops=flops, weight_bytes=num_parameters * weight_bits / 8,
            num_parameters=num_parameters, kv_bytes=kv_bytes_per_token(model),
            attention_flops=4.0 * model.num_heads * model.head_dim * model.num_layers,
        )  # fmt: skip

    def seconds(self, work: StepWork) -> float:
        bandwidth, flops = self.bandwidth * self.efficiency, self.flops * self.efficiency
        linear = max(self.weight_bytes / bandwidth, 2 * self.num_parameters * work.num_tokens / flops)
        decode = work.decode_context * self.kv_bytes / bandwidth
        return linear + decode + work.prefill_pairs * self.attention_flops / flops


def kv_bytes_per_token(model: ModelConfig) -> float:
    """Keys and values of all layers in bfloat16."""
    return 4.0 * model.num_layers * model.num_kv_heads * model.head_dim


class Profile(msgspec.Struct, kw_only=True):
    """What is known of an engine: how long its steps take, and what its KV cache holds."""

    step_time: FittedStepTime
    num_blocks: int
    block_size: int
    max_model_len: int


def load_profile(path: Path) -> Profile:
    """What `bench sim --measure` wrote. Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path} is no step profile: {error}.", remedy="`penstock bench sim --measure` makes one."
        ) from None
