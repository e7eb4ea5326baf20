"""What is made of the inputs that calibration shows: importance for GGUF's types, GPTQ's codes, AWQ's scales.

Each writes its results to the journal as it finds them, and passes over those that are there.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from penstock.base.errors import ConfigError
from penstock.config.quantization import quantization_of
from penstock.conversion.awq_search import input_scales
from penstock.conversion.calibration import Site
from penstock.conversion.gptq_search import gptq
from penstock.conversion.group_codes import nearest
from penstock.conversion.journal import Journal
from penstock.conversion.recipe import Recipe, grid_of, quantization_config, tensors_of
from penstock.conversion.source_rows import SourceRows
from penstock.kernels.ops import Ops
from penstock.quantization import CheckpointSource, LinearWeight, hub_format

_PIECE_TOKENS: Final = 4096
_SAMPLE_TOKENS: Final = 256
_AWQ_ARCHITECTURES: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class ImportanceObserver:
    """Keeps the mean square of each input of a site, under the site's first name."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __call__(self, site: Site, x_TK: Tensor) -> None:
        if site.names[0] not in self._journal:
            squares_K = _mean_squares(x_TK)
            self._journal.write(site.names[0], {name: squares_K.clone() for name in site.names})


class GPTQObserver:
    """Quantises each site by GPTQ and multiplies with the result, so that later layers make up for earlier ones."""

    def __init__(self, rows: SourceRows, journal: Journal, target: str, recipe: Recipe) -> None:
        self._rows = rows
        self._journal = journal
        self._target = target
        self._recipe = recipe
        self._settings: dict[str, Any] = {"quantization_config": quantization_config(target, recipe)}

    def __call__(self, site: Site, x_TK: Tensor) -> Callable[[Ops], LinearWeight] | None:
        grid = grid_of(self._target, self._recipe)
        if site.num_columns % grid.width(site.num_columns):
            return None
        if site.names[0] not in self._journal:
            moments_KK = _moments(x_TK)
            tensors: dict[str, Tensor] = {}
            for name in site.names:
                found = gptq(self._rows.matrix(f"{name}.weight"), moments_KK, grid, self._recipe.act_order)
                tensors |= tensors_of(self._target, self._recipe, name, found)
            self._journal.write(site.names[0], tensors)
        return partial(self._load, site, x_TK.dtype)

    def _load(self, site: Site, dtype: torch.dtype, ops: Ops) -> LinearWeight:
        with closing(self._journal.open(site.names[0])) as checkpoint:
            config = quantization_of(self._settings)
            assert config is not None
            chosen = hub_format(dtype, config, {name: checkpoint.tensor_type(name) for name in checkpoint.names()})
            source = CheckpointSource(checkpoint, chosen.ignores, lambda _share: None)
            return chosen.load_linear(source, site.names, site.num_rows, site.num_columns, ops)


class AWQObserver:
    """Finds the scales of each site's inputs, divides them out of what comes before it, and rounds what is left.

    What comes before a site: the norm, or for `down_proj` the outputs of `up_proj`, which waits for that.
    """

    def __init__(self, rows: SourceRows, journal: Journal, recipe: Recipe) -> None:
        if rows.model.architecture not in _AWQ_ARCHITECTURES:
            raise ConfigError(f"AWQ of {rows.model.architecture} is not known.", remedy="Choose gptq or w4a16.")
        self._rows = rows
        self._journal = journal
        self._recipe = recipe
        self._grid = grid_of("awq", recipe)
        self._waiting: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, site: Site, x_TK: Tensor) -> None:
        layer, last = site.names[0].rsplit(".", 2)[0], site.names[0].rsplit(".", 1)[1]
        feeder = {
            "q_proj": f"{layer}.input_layernorm",
            "gate_proj": f"{layer}.post_attention_layernorm",
            "down_proj": f"{layer}.mlp.up_proj",
        }.get(last)
        wanted = (*site.names, *([feeder] if feeder is not None else []))
        if any(name not in self._journal for name in wanted):
            self._quantise(site, feeder, x_TK)

    def _quantise(self, site: Site, feeder: str | None, x_TK: Tensor) -> None:
        squares_K, scales_K = _mean_squares(x_TK), torch.ones(site.num_columns)
        if feeder is not None:
            weights = [self._rows.matrix(f"{name}.weight") for name in site.names]
            sample = x_TK[:: max(len(x_TK) // _SAMPLE_TOKENS, 1)][:_SAMPLE_TOKENS].float()
            scales_K = input_scales(weights, sample, _mean_magnitudes(x_TK), self._grid)
        if feeder in self._waiting:
            self._write(feeder, *self._waiting.pop(feeder), divisor_N=scales_K)
        elif feeder is not None and feeder.endswith("norm"):
            scales_K = self._fold_into_norm(feeder, scales_K)
        for name in site.names:
            if name.endswith("up_proj"):
                self._waiting[name] = (scales_K, squares_K)
            else:
                self._write(name, scales_K, squares_K)

    def _fold_into_norm(self, name: str, scales_K: Tensor) -> Tensor:
        """Writes the norm divided by the scales -> the scales as they are after its rounding."""
        norm_K = self._rows.vector(f"{name}.weight")
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(
            self._rows.stored_type(f"{name}.weight"), torch.float32
        )
        folded_K = (norm_K / scales_K).to(dtype)
        self._journal.write(name, {f"{name}.weight": folded_K})
        return torch.where(folded_K == 0, 1.0, norm_K / folded_K.float())

    def _write(self, name: str, scales_K: Tensor, squares_K: Tensor, divisor_N: Tensor | None = None) -> None:
        weight_NK = self._rows.matrix(f"{name}.weight") * scales_K
        tensors: dict[str, Tensor] = {}
        if divisor_N is not None:
            weight_NK /= divisor_N[:, None]
            if f"{name}.bias" in self._rows.names:
                tensors[f"{name}.bias"] = self._rows.vector(f"{name}.bias") / divisor_N
        found = nearest(weight_NK, self._grid, squares_K / scales_K.square())
        self._journal.write(name, tensors | tensors_of("awq", self._recipe, name, found))


def _moments(x_TK: Tensor) -> Tensor:
    """X^T X, float32 [K, K]"""
    total = torch.zeros(x_TK.shape[1], x_TK.shape[1])
    for piece in torch.split(x_TK, _PIECE_TOKENS):
        wide = piece.float()
        total.addmm_(wide.T, wide)
    return total


def _mean_squares(x_TK: Tensor) -> Tensor:
    """float32 [K]"""
    return torch.stack([piece.float().square().sum(0) for piece in torch.split(x_TK, _PIECE_TOKENS)]).sum(0) / len(x_TK)


def _mean_magnitudes(x_TK: Tensor) -> Tensor:
    """float32 [K]"""
    return torch.stack([piece.float().abs().sum(0) for piece in torch.split(x_TK, _PIECE_TOKENS)]).sum(0) / len(x_TK)
