"""Rotary position embedding: cosines and sines by position, for every scaling that transformers knows.

A token's rotation depends on its position only, never on how long its request has become: otherwise results would
depend on chunking, and cached keys would not match new queries. So the two scalings that transformers recomputes
as a sequence grows (dynamic, longrope) are fixed here by max_model_len, the longest sequence that can occur. Below the
length the model was trained for, they equal transformers exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.config.model import RopeConfig
from penstock.kernels.ops import HOST


class RotaryTable:
    """cos and sin of every position's angles, [max_model_len, E / 2] float32, scaled by the attention factor."""

    __slots__ = ("_device_tables", "cos_PE", "sin_PE")

    def __init__(
        self,
        rope: RopeConfig,
        head_dim: int,
        max_position_embeddings: int,
        max_model_len: int,
        device: torch.device = HOST,
    ) -> None:
        inverse_E, attention_factor = inverse_frequencies(rope, head_dim, max_position_embeddings, max_model_len)
        angles_PE = torch.arange(max_model_len, dtype=torch.float32)[:, None] * inverse_E
        self.cos_PE = angles_PE.cos().mul_(attention_factor).numpy()
        self.sin_PE = angles_PE.sin_().mul_(attention_factor).numpy()
        self._device_tables: tuple[Tensor, Tensor] | None = None
        if device.type != "cpu":
            self._device_tables = torch.from_numpy(self.cos_PE).to(device), torch.from_numpy(self.sin_PE).to(device)

    def __call__(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """[T] int64 -> cosines and sines, each [T, E / 2] float32."""
        if self._device_tables is not None:
            cos_PE, sin_PE = self._device_tables
            return cos_PE.index_select(0, positions_T), sin_PE.index_select(0, positions_T)
        positions = positions_T.numpy()  # numpy's take costs a fifth of torch's index_select on a decode step
        return torch.from_numpy(self.cos_PE.take(positions, axis=0)), torch.from_numpy(
            self.sin_PE.take(positions, axis=0)
        )


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, max_position_embeddings: int, max_model_len: int
) -> tuple[Tensor, float]:
    """Inverse frequencies [E / 2] float32 of each pair, and the factor for cos and sin."""
    theta = rope.rope_theta
    match rope.rope_type:
        case "default":
            return 1.0 / _powers(theta, head_dim), 1.0
        case "linear":
            return 1.0 / _powers(theta, head_dim) / rope.factor, 1.0
        case "dynamic":
            length = max(max_model_len, max_position_embeddings)
            stretch = rope.factor * length / max_position_embeddings - (rope.factor - 1)
            return 1.0 / _powers(theta * stretch ** (head_dim / (head_dim - 2)), head_dim), 1.0
        case "llama3":
            return _llama3(rope, 1.0 / _powers(theta, head_dim)), 1.0
        case "yarn":
            return _yarn(rope, head_dim), _yarn_attention_factor(rope)
        case "longrope":
            is_long = max_model_len > rope.original_max_position_embeddings
            factors = torch.tensor(rope.long_factor if is_long else rope.short_factor, dtype=torch.float32)
            return 1.0 / (factors * _powers(theta, head_dim)), _longrope_attention_factor(rope)


def _powers(theta: float, head_dim: int) -> Tensor:
    """theta ** (2i / E) for each pair i."""
    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _llama3(rope: RopeConfig, inverse_E: Tensor) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    wavelength_E = 2 * math.pi / inverse_E
    original = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend_E = ((original / wavelength_E - low) / (high - low)).clamp(0.0, 1.0)
    blended_E = (1 - blend_E) * inverse_E / rope.factor + blend_E * inverse_E
    scaled_E = torch.where(wavelength_E > original / low, inverse_E / rope.factor, blended_E)
    return torch.where(wavelength_E < original / high, inverse_E, scaled_E)


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """Pairs that turn often within the original context are kept, those that turn rarely are stretched."""

    def pair_turning(turns: float) -> float:
        """The (fractional) pair that turns so many times within the original context."""
        ratio = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.rope_theta))

    first, last = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    pairs_E = torch.arange(head_dim // 2, dtype=torch.float32)
    stretched_E = ((pairs_E - first) / (last - first)).clamp(0, 1)
    powers_E = _powers(rope.rope_theta, head_dim)
    return (1.0 / (rope.factor * powers_E)) * stretched_E + (1.0 / powers_E) * (1 - stretched_E)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
