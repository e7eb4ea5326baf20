"""From a configuration to a model with its weights.

Owns: nothing.
Never: reads a weight before the memory plan has been accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

import torch

from penstock.config.engine import EngineConfig
from penstock.kernels.ops import Ops
from penstock.layers import Weights
from penstock.loader import Checkpoint
from penstock.models import ARCHITECTURES, CausalLM, is_ignored_tensor
from penstock.quantization import CheckpointSource, DummySource, LinearFormat, UnquantizedFormat
from penstock.quantization.measuring import MeasuringFormat
from penstock.quantization.tensor_source import TensorSource

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def torch_dtype(name: str) -> torch.dtype:
    return _DTYPES[name]


def linear_format(config: EngineConfig) -> LinearFormat:
    """The format of the checkpoint's linears."""
    return UnquantizedFormat(torch_dtype(config.dtype))


def weights_nbytes(config: EngineConfig, ops: Ops) -> int:
    """Bytes the weights will take: the model's own constructor runs, on nothing."""
    measuring = MeasuringFormat(linear_format(config))
    weights = Weights(measuring, measuring, torch_dtype(config.dtype), ops)
    ARCHITECTURES[config.model.architecture](config.model, weights, 1)
    return measuring.nbytes


def load_model(config: EngineConfig, ops: Ops, on_progress: Callable[[float], None]) -> CausalLM:
    """Builds the model. Raises CheckpointError."""
    if config.load_format == "dummy":
        dtype = torch_dtype(config.dtype)
        return _build(config, DummySource(config.seed, dtype, on_progress, weights_nbytes(config, ops)), ops)
    with closing(Checkpoint(Path(config.model_path))) as checkpoint:
        source = CheckpointSource(checkpoint, lambda name: is_ignored_tensor(name, config.model), on_progress)
        return _build(config, source, ops)


def _build(config: EngineConfig, source: TensorSource, ops: Ops) -> CausalLM:
    weights = Weights(source, linear_format(config), torch_dtype(config.dtype), ops)
    model = ARCHITECTURES[config.model.architecture](config.model, weights, config.scheduler.max_model_len)
    source.finish()
    return model
