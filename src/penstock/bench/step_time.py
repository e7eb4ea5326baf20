"""How long a step takes, from what is in it: fitted to measured steps, or from a machine's limits."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul
from pathlib import Path
from typing import Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.base.errors import ConfigError
from penstock.config.model import ModelConfig
from penstock.engine.step_log import LoggedStep, StepWork

# Tokens a step at which the cost of one more changes: by then weights are read for one, then for a tile, and so on.
_KNEES: Final = (1, 4, 16, 64)
MIN_STEPS: Final = 30
MIN_OF_A_KIND: Final = 20
IDLE_S: Final = 0.001  # a longer pause means that there was nothing to run
# After so long a rest a step takes longer, whatever is in it: caches hold other things, and cores sleep.
RESTS_S: Final = (0.02, 0.1)
MIN_RESTED: Final = 8
_NUM_SIZES: Final = 12
_NUM_QUANTILES: Final = 50


class Frontend(msgspec.Struct, frozen=True, kw_only=True):
    """What stands between a client and the engine, in seconds. All of it is latency: that it takes cores from the
    engine is in the measured steps.

    request_s: from the client's send to the engine's inbox; prompt_token_s: more of it for each token of the prompt.
    output_s: from the end of a step to the client's having the first of its outputs; each further one comes
    next_output_s later.
    """

    request_s: float = 0.0
    prompt_token_s: float = 0.0
    output_s: float = 0.0
    next_output_s: float = 0.0


# Of a server on a machine with cores to spare, where nothing was measured.
USUAL_FRONTEND: Final = Frontend(request_s=0.001, prompt_token_s=1e-6, output_s=0.0005, next_output_s=2e-5)


class StepTime(Protocol):
    """seconds: of a step on the device; typical. draw: of one such step on a device that was idle for idle_s before it,
    for a number drawn from [0, 1). host_s: of Python between two steps, hidden while the device works. error: median
    relative error of `seconds`.
    """

    @property
    def host_s(self) -> float: ...

    @property
    def frontend(self) -> Frontend: ...

    @property
    def error(self) -> float: ...

    def seconds(self, work: StepWork) -> float: ...

    def draw(self, work: StepWork, drawn: float, idle_s: float) -> float: ...


class FittedStepTime(msgspec.Struct, frozen=True, kw_only=True):
    """Two non-negative linear models of a step's parts, and how far steps of each kind lay from them.

    coefficients: of steps that only decode, and of all where prompt_coefficients is empty; else those are of steps with
    prompts in them. error: median relative error over the steps it was fitted to. spreads: by kind, evenly spaced
    quantiles of measured over modelled; empty: none. rest_s: what a rest adds to the step after it, by its length
    (RESTS_S); rested: the spreads of these steps.
    """

    coefficients: list[float]
    prompt_coefficients: list[float] = []
    host_s: float
    error: float
    num_steps: int
    frontend: Frontend = Frontend()
    spreads: list[list[float]] = []
    rest_s: tuple[float, ...] = (0.0,) * len(RESTS_S)
    rested: list[list[float]] = []
    source: str = ""

    def seconds(self, work: StepWork) -> float:
        factors = self.prompt_coefficients if work.prefill_pairs and self.prompt_coefficients else self.coefficients
        return sum(map(mul, factors, _features(work)), start=0.0)

    def draw(self, work: StepWork, drawn: float, idle_s: float) -> float:
        seconds = self.seconds(work)
        rest = bisect_right(RESTS_S, idle_s)
        if rest and self.rested:
            seconds += self.rest_s[rest - 1]
            quantiles = self.rested[rest - 1]
        else:
            quantiles = self.spreads[kind_of(work)] if self.spreads else []
        return seconds * quantiles[int(drawn * len(quantiles))] if quantiles else seconds


def _features(work: StepWork) -> tuple[int, ...]:
    tokens = work.num_tokens
    first, second, third, fourth = _KNEES
    return (
        1, tokens - first if tokens > first else 0, tokens - second if tokens > second else 0,
        tokens - third if tokens > third else 0, tokens - fourth if tokens > fourth else 0,
        work.num_sampled, work.decode_context, work.prefill_pairs,
    )  # fmt: skip


def kind_of(work: StepWork) -> int:
    """Steps of one kind vary alike: by tokens in powers of two, with prompts in them or not."""
    size = min(_NUM_SIZES - 1, (work.num_tokens - 1).bit_length())
    return size + (_NUM_SIZES if work.prefill_pairs else 0)


def fit_step_time(steps: Sequence[LoggedStep], frontend: Frontend | None = None, source: str = "") -> FittedStepTime:
    """Least squares of the relative error, no coefficient below 0. Raises ConfigError when there are too few steps.

    steps: in the order in which they ran.
    """
    if len(steps) < MIN_STEPS:
        raise ConfigError(f"{len(steps)} steps are too few to fit a model.", remedy=f"Measure at least {MIN_STEPS}.")
    idle_s = idle_seconds(steps)
    busy = [seconds for seconds in idle_s if seconds < IDLE_S]
    is_rested = np.asarray(idle_s) >= RESTS_S[0]
    has_prompts = np.asarray([step.work.prefill_pairs > 0 for step in steps])
    seconds = np.asarray([step.seconds for step in steps])
    features = np.asarray([_features(step.work) for step in steps], dtype=np.float64)
    fewest = min(np.sum(has_prompts & ~is_rested), np.sum(~has_prompts & ~is_rested))
    modelled = np.empty(len(steps))
    found: list[list[float]] = []
    for part in (~has_prompts, has_prompts) if fewest >= MIN_STEPS else (np.ones(len(steps), dtype=bool),):
        chosen = part & ~is_rested
        coefficients = _fit(features[chosen], seconds[chosen])
        modelled[part] = features[part] @ coefficients
        found.append(coefficients.tolist())
    ratios = seconds / np.maximum(modelled, 1e-9)
    kinds = np.asarray([kind_of(step.work) for step in steps])
    rest_s, rested = _rested(idle_s, seconds, modelled)
    return FittedStepTime(
        coefficients=found[0], prompt_coefficients=found[1] if len(found) > 1 else [],
        host_s=max(0.0, statistics.median(busy)) if busy else 0.0,
        error=float(np.median(np.abs(1 / ratios[~is_rested] - 1.0))), num_steps=len(steps),
        frontend=frontend or Frontend(),
        spreads=_spreads(kinds[~is_rested], ratios[~is_rested]), rest_s=rest_s, rested=rested,
        source=source,
    )  # fmt: skip


def _fit(features: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights = 1.0 / seconds
    coefficients = np.zeros(features.shape[1])
    for _ in range(3):  # steps that were disturbed from outside lose their say
        coefficients = _non_negative(features * weights[:, None], seconds * weights)
        error = np.abs(features @ coefficients / seconds - 1.0)
        weights = 1.0 / seconds / np.maximum(error / max(float(np.median(error)), 1e-3), 1.0)
    return coefficients


def idle_seconds(steps: Sequence[LoggedStep]) -> list[float]:
    """How long the device had nothing to do before each step; before the first, for ever."""
    pauses = (after.started_s - before.started_s - before.seconds for before, after in pairwise(steps))
    return [math.inf, *pauses]


def _rested(
    idle_s: Sequence[float], seconds: npt.NDArray[np.float64], modelled: npt.NDArray[np.float64]
) -> tuple[tuple[float, ...], list[list[float]]]:
    """What each length of a rest adds, and quantiles of what is left; of one that was hardly seen, the other's.

    The addition is the median of what the steps took beyond the model. Long steps count for less, as they vary more.
    """
    rests = np.searchsorted(RESTS_S, idle_s, side="right")
    found = [np.flatnonzero(rests == rest + 1) for rest in range(len(RESTS_S))]
    enough = [part for part in found if len(part) >= MIN_RESTED]
    if not enough:
        return (0.0,) * len(RESTS_S), []
    shares = (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
    rest_s: list[float] = []
    quantiles: list[list[float]] = []
    for part in (part if len(part) >= MIN_RESTED else enough[0] for part in found):
        beyond = seconds[part] - modelled[part]
        order = np.argsort(beyond)
        weights = np.cumsum(1 / np.maximum(modelled[part][order], 1e-9))
        rest_s.append(max(0.0, float(beyond[order][np.searchsorted(weights, weights[-1] / 2)])))
        quantiles.append(np.quantile(seconds[part] / (modelled[part] + rest_s[-1]), shares).tolist())
    return tuple(rest_s), quantiles


def _spreads(kinds: npt.NDArray[np.int64], ratios: npt.NDArray[np.float64]) -> list[list[float]]:
    """Quantiles for each kind; of a kind that was hardly seen, those of its nearest one."""
    shares = (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
    found: list[list[float]] = []
    for kind in range(2 * _NUM_SIZES):
        chosen = ratios[kinds == kind]
        found.append(np.quantile(chosen, shares).tolist() if len(chosen) >= MIN_OF_A_KIND else [])
    everything = np.quantile(ratios, shares).tolist()
    for half in (0, _NUM_SIZES):
        known = [size for size in range(_NUM_SIZES) if found[half + size]]
        for size in range(_NUM_SIZES):
            if not found[half + size]:
                nearest = min(((abs(other - size), other) for other in known), default=None)
                found[half + size] = everything if nearest is None else found[half + nearest[1]]
    return found


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
    attention_flops: of one (query, key) pair, all layers. fixed_s: of a step, whatever is in it.
    """

    bandwidth: float
    flops: float
    weight_bytes: float
    num_parameters: float
    kv_bytes: float
    attention_flops: float
    efficiency: float = 0.7
    host_s: float = 0.0005
    frontend: Frontend = USUAL_FRONTEND
    fixed_s: float = 0.0
    error: float = 0.3  # a guess: limits say what cannot be beaten, not what is reached

    @classmethod
    def of_model(cls, model: ModelConfig, bandwidth: float, flops: float, weight_bits: float = 16) -> HardwareStepTime:
        """A model with weights of that many bits on that machine."""
        attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim * model.hidden_size
        held, used = _feed_forward_widths(model)
        outside = model.num_layers * attention + model.vocab_size * model.hidden_size
        return cls(
            bandwidth=bandwidth, flops=flops,
            weight_bytes=(outside + 3.0 * model.hidden_size * held) * weight_bits / 8,
            num_parameters=outside + 3.0 * model.hidden_size * used, kv_bytes=kv_bytes_per_token(model),
            attention_flops=4.0 * model.num_heads * model.head_dim * model.num_layers,
        )  # fmt: skip

    def seconds(self, work: StepWork) -> float:
        bandwidth, flops = self.bandwidth * self.efficiency, self.flops * self.efficiency
        linear = max(self.weight_bytes / bandwidth, 2 * self.num_parameters * work.num_tokens / flops)
        decode = work.decode_context * self.kv_bytes / bandwidth
        return self.fixed_s + linear + decode + work.prefill_pairs * self.attention_flops / flops

    def draw(self, work: StepWork, *_: object) -> float:
        """A limit does not vary."""
        return self.seconds(work)


@dataclass(frozen=True)
class ScaledStepTime:
    """Another machine's steps by one number: each takes `factor` times as long."""

    inner: StepTime
    factor: float

    @property
    def host_s(self) -> float:
        return self.inner.host_s

    @property
    def frontend(self) -> Frontend:
        return self.inner.frontend

    @property
    def error(self) -> float:
        return self.inner.error

    def seconds(self, work: StepWork) -> float:
        return self.inner.seconds(work) * self.factor

    def draw(self, work: StepWork, drawn: float, idle_s: float) -> float:
        return self.inner.draw(work, drawn, idle_s) * self.factor


def _feed_forward_widths(model: ModelConfig) -> tuple[int, int]:
    """Of all layers, what is held and what a token goes through. A step of few tokens reads less of a mixture's."""
    experts = model.experts
    if experts is None:
        return (model.num_layers * model.intermediate_size,) * 2
    dense = len(experts.dense_layers) * model.intermediate_size
    num_mixtures, shared = model.num_layers - len(experts.dense_layers), experts.shared_intermediate_size
    held, used = (
        dense + num_mixtures * (count * experts.intermediate_size + shared)
        for count in (experts.count, experts.per_token)
    )
    return held, used


def kv_bytes_per_token(model: ModelConfig) -> float:
    """Keys and values of all layers in bfloat16."""
    return 4.0 * model.num_layers * model.num_kv_heads * model.head_dim


class Profile(msgspec.Struct, kw_only=True):
    """What is known of an engine: how long its steps take, and what its KV cache holds."""

    step_time: FittedStepTime
    num_blocks: int
    block_size: int
    max_model_len: int
    quantization: str = ""


def load_profile(path: Path) -> Profile:
    """What `bench sim --measure` wrote. Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path} is no step profile: {error}.", remedy="`penstock bench sim --measure` makes one."
        ) from None
