"""How long a step takes, from what is in it: fitted to measured steps, or from a machine's limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
_KNEES: Final = (1, 2, 4, 8, 16, 64, math.inf)
NUM_COEFFICIENTS: Final = len(_KNEES) + 5
MIN_STEPS: Final = 30
MIN_OF_A_KIND: Final = 20
IDLE_S: Final = 0.001  # a longer pause means that there was nothing to run
WARM_S: Final = 0.1  # how far back it matters whether the device was at work
_NUM_SIZES: Final = 12
_NUM_QUANTILES: Final = 50


class Frontend(msgspec.Struct, frozen=True, kw_only=True):
    """What stands between clients and the engine, in seconds: one process that does one thing after another. That it
    takes cores from the engine is in the measured steps.

    request_s: from the client's send to the engine's inbox; prompt_token_s: more of it for each token of the prompt.
    output_s: from the end of a step to the client's having the first of its outputs; each further one comes
    next_output_s later, and a request's own first output takes first_output_s more. request_spread, output_spread:
    evenly spaced quantiles of how far single ones lay from request_s and output_s, as factors; empty: none.
    """

    request_s: float = 0.0
    prompt_token_s: float = 0.0
    output_s: float = 0.0
    first_output_s: float = 0.0
    next_output_s: float = 0.0
    request_spread: list[float] = []
    output_spread: list[float] = []


# Of a server on a machine with cores to spare, where nothing was measured.
USUAL_FRONTEND: Final = Frontend(request_s=0.001, prompt_token_s=1e-6, output_s=0.0005, next_output_s=2e-5)


class StepTime(Protocol):
    """seconds: of a step on a warm device; typical. draw: of one such step, for a number drawn from [0, 1), on a device
    that was so cold (Coldness). host_s: of Python between two steps, hidden while the device works. error: median
    relative error of `seconds`.
    """

    @property
    def host_s(self) -> float: ...

    @property
    def frontend(self) -> Frontend: ...

    @property
    def error(self) -> float: ...

    def seconds(self, work: StepWork) -> float: ...

    def draw(self, work: StepWork, drawn: float, coldness: float) -> float: ...


def quantile(spread: Sequence[float], drawn: float) -> float:
    """Of evenly spaced quantiles the one that a number drawn from [0, 1) falls upon; 1 where there are none."""
    return spread[int(drawn * len(spread))] if spread else 1.0


def spread_of(ratios: Sequence[float] | npt.NDArray[np.float64]) -> list[float]:
    """Evenly spaced quantiles."""
    shares = (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
    return [float(found) for found in np.quantile(ratios, shares)]


class Coldness:
    """How idle a device was of late: 1 after a long rest, 0 after as much work; WARM_S is the time constant.

    A step on a cold device takes longer: caches hold other things, cores slept or run slowly.
    """

    __slots__ = ("_end_s", "_value")

    def __init__(self) -> None:
        self._end_s = -math.inf
        self._value = 1.0

    def before(self, start_s: float) -> float:
        """Of the device as it begins a step. Steps are told in their order."""
        idle_s = max(0.0, start_s - self._end_s)
        self._value = 1.0 - (1.0 - self._value) * math.exp(-idle_s / WARM_S)
        self._end_s = start_s
        return self._value

    def work(self, seconds: float) -> None:
        """The step took so long."""
        self._end_s += seconds
        self._value *= math.exp(-seconds / WARM_S)


class FittedStepTime(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Two non-negative linear models of a step's parts, and how far steps of each kind lay from them.

    coefficients: of steps that only decode, and of all where prompt_coefficients is empty; else those are of steps with
    prompts in them. error: median relative error over the steps it was fitted to. spreads: by kind, evenly spaced
    quantiles of measured over modelled; empty: none.
    """

    coefficients: list[float]
    prompt_coefficients: list[float] = []
    error: float
    num_steps: int
    frontend: Frontend = Frontend()
    spreads: list[list[float]] = []
    source: str = ""

    @property
    def host_s(self) -> float:
        """The pauses between measured steps are part of them."""
        return 0.0

    def __post_init__(self) -> None:
        if len(self.coefficients) != NUM_COEFFICIENTS or len(self.prompt_coefficients) not in (0, NUM_COEFFICIENTS):
            raise ValueError(f"a step model has {NUM_COEFFICIENTS} coefficients")

    def seconds(self, work: StepWork) -> float:
        return self._parts(work, 0.0)[0]

    def draw(self, work: StepWork, drawn: float, coldness: float) -> float:
        seconds, spread = self._parts(work, coldness)
        return seconds * spread[int(drawn * len(spread))]

    def _parts(self, work: StepWork, coldness: float) -> tuple[float, Sequence[float]]:
        """(typical seconds, how steps of the kind vary)."""
        tokens, pairs = work.num_tokens, work.prefill_pairs
        known = self._known.get((tokens, pairs > 0)) or self._learn(work)
        of_tokens_s, sampled_s, context_s, pairs_s, cold_s, spread = known
        seconds = of_tokens_s + sampled_s * work.num_sampled + context_s * work.decode_context + pairs_s * pairs
        return seconds + coldness * cold_s, spread

    def _learn(self, work: StepWork) -> tuple[float, float, float, float, float, Sequence[float]]:
        """What is the same for all steps of so many tokens, with prompts in them or without."""
        tokens, has_prompts = work.num_tokens, work.prefill_pairs > 0
        factors = self.prompt_coefficients if has_prompts and self.prompt_coefficients else self.coefficients
        sampled_s, context_s, pairs_s, cold_s, cold_token_s = factors[len(_KNEES) :]
        known = self._known[tokens, has_prompts] = (
            sum(map(mul, factors, _ramps(tokens)), start=0.0), sampled_s, context_s, pairs_s,
            cold_s + cold_token_s * tokens, self.spreads[kind_of(work)] if self.spreads else (1.0,),
        )  # fmt: skip
        return known

    @cached_property
    def _known(self) -> dict[tuple[int, bool], tuple[float, float, float, float, float, Sequence[float]]]:
        return {}


def _ramps(tokens: int) -> tuple[float, ...]:
    """A step's time is linear in its tokens between knees, and grows at each as it may."""
    return 1, *(min(tokens, high) - low if tokens > low else 0 for low, high in pairwise(_KNEES))


def _features(work: StepWork, coldness: float) -> tuple[float, ...]:
    """What a step's time is made of, in the order of the coefficients."""
    tokens = work.num_tokens
    return (
        *_ramps(tokens), work.num_sampled, work.decode_context, work.prefill_pairs, coldness, coldness * tokens,
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
    has_prompts = np.asarray([step.work.prefill_pairs > 0 for step in steps])
    seconds = np.asarray(occupied_seconds(steps))
    features = np.asarray(
        [_features(*found) for found in zip((step.work for step in steps), coldness_of(steps), strict=True)],
        dtype=np.float64,
    )
    fewest = min(np.sum(has_prompts), np.sum(~has_prompts))
    modelled = np.empty(len(steps))
    found: list[list[float]] = []
    for part in (~has_prompts, has_prompts) if fewest >= MIN_STEPS else (np.ones(len(steps), dtype=bool),):
        coefficients = _fit(features[part], seconds[part])
        modelled[part] = features[part] @ coefficients
        found.append(coefficients.tolist())
    ratios = seconds / np.maximum(modelled, 1e-9)
    kinds = np.asarray([kind_of(step.work) for step in steps])
    return FittedStepTime(
        coefficients=found[0], prompt_coefficients=found[1] if len(found) > 1 else [],
        error=float(np.median(np.abs(1 / ratios - 1.0))), num_steps=len(steps),
        frontend=frontend or Frontend(), spreads=_spreads(kinds, ratios), source=source,
    )  # fmt: skip


def _fit(features: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights = 1.0 / seconds
    coefficients = np.zeros(features.shape[1])
    for _ in range(3):  # steps that were disturbed from outside lose their say
        coefficients = _non_negative(features * weights[:, None], seconds * weights)
        error = np.abs(features @ coefficients / seconds - 1.0)
        weights = 1.0 / seconds / np.maximum(error / max(float(np.median(error)), 1e-3), 1.0)
    return coefficients


def occupied_seconds(steps: Sequence[LoggedStep]) -> list[float]:
    """How long each kept the device from the next: itself, and the pause before it while there was something to run."""
    found, end_s = [], -math.inf
    for step in steps:
        pause_s = step.started_s - end_s
        found.append(step.seconds + (pause_s if 0 < pause_s < IDLE_S else 0.0))
        end_s = step.started_s + step.seconds
    return found


def coldness_of(steps: Sequence[LoggedStep]) -> list[float]:
    """Of the device before each step."""
    coldness = Coldness()
    found = []
    for step in steps:
        found.append(coldness.before(step.started_s))
        coldness.work(step.seconds)
    return found


def _spreads(kinds: npt.NDArray[np.int64], ratios: npt.NDArray[np.float64]) -> list[list[float]]:
    """Quantiles for each kind; of a kind that was hardly seen, those of its nearest one."""
    found: list[list[float]] = []
    for kind in range(2 * _NUM_SIZES):
        chosen = ratios[kinds == kind]
        found.append(spread_of(chosen) if len(chosen) >= MIN_OF_A_KIND else [])
    everything = spread_of(ratios)
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

    def draw(self, work: StepWork, drawn: float, coldness: float) -> float:
        return self.inner.draw(work, drawn, coldness) * self.factor


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
