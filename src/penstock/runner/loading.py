"""From a configuration to a model with its weights.

Owns: nothing.
Never: reads a weight before the memory plan has been accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import torch

from penstock.base.errors import ConfigError
from penstock.config.engine import EngineConfig
from penstock.kernels.ops import Ops
from penstock.layers import Weights
from penstock.loader import BodyCheckpoint, Checkpoint, GGUFCheckpoint, open_checkpoint
from penstock.models import ARCHITECTURES, LanguageModel, base_prefix, is_ignored_tensor
from penstock.quantization import (
    CheckpointSource,
    DummySource,
    GGUFFormat,
    OnlineFormat,
    StoredFormat,
    TensorSource,
    UnquantizedFormat,
    hub_format,
    is_block_type,
)
from penstock.quantization.measuring import MeasuringFormat

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def torch_dtype(name: str) -> torch.dtype:
    return _DTYPES[name]


def linear_format(config: EngineConfig, checkpoint: Checkpoint | None) -> StoredFormat:
    """The format of the checkpoint's linears (None: of random weights), or what they are quantised to."""
    dtype = torch_dtype(config.dtype)
    if isinstance(checkpoint, GGUFCheckpoint):
        types = {name: checkpoint.tensor_type(name) for name in checkpoint.names()}
        if config.quantization is None:
            return GGUFFormat(dtype, types)
        if any(is_block_type(kind) for kind in types.values()):
            raise _quantized_twice(config)
    stored = config.model.quantization
    if checkpoint is not None and stored is not None:
        if config.quantization is not None:
            raise _quantized_twice(config)
        return hub_format(dtype, stored, {name: checkpoint.tensor_type(name) for name in checkpoint.names()})
    if config.quantization is not None:
        return OnlineFormat(dtype, config.quantization, config.model)
    return UnquantizedFormat(dtype)


def weights_nbytes(config: EngineConfig, ops: Ops) -> int:
    """Bytes the weights will take: the model's own constructor runs, on nothing.

    Only the headers of quantised checkpoints are read: of floats, the configuration says it all.
    """
    if config.model.quantization is None and not Path(config.model_path).is_file():
        return _measure(config, linear_format(config, None), ops)
    with _opened(config) as checkpoint:
        return _measure(config, linear_format(config, checkpoint), ops)


def load_model(
    config: EngineConfig,
    ops: Ops,
    on_progress: Callable[[float], None],
    on_packed: Callable[[float], None] | None = None,
) -> LanguageModel:
    """Builds the model. on_packed: gets the seconds that packing the linears took. Raises CheckpointError."""
    with _opened(config) as checkpoint:
        chosen = linear_format(config, checkpoint)
        source: TensorSource
        if checkpoint is None:
            dtype = torch_dtype(config.dtype)
            source = DummySource(config.seed, dtype, on_progress, _measure(config, UnquantizedFormat(dtype), ops))
        else:
            source = CheckpointSource(
                checkpoint, lambda name: is_ignored_tensor(name, config.model) or chosen.ignores(name), on_progress
            )
        if isinstance(chosen, GGUFFormat):
            chosen.report_widened()
        weights = Weights(source, chosen, torch_dtype(config.dtype), ops)
        model = ARCHITECTURES[config.model.architecture](config.model, weights, config.scheduler.max_model_len)
        source.finish()
        if on_packed is not None:
            on_packed(chosen.packing_s)
        return model


@contextmanager
def _opened(config: EngineConfig) -> Iterator[Checkpoint | None]:
    if config.load_format == "dummy":
        yield None
        return
    with closing(open_checkpoint(Path(config.model_path))) as checkpoint:
        prefix = base_prefix(config.model.architecture)
        is_whole = any(name.startswith(prefix) for name in checkpoint.names())
        yield checkpoint if is_whole else BodyCheckpoint(checkpoint, prefix)


def _measure(config: EngineConfig, chosen: StoredFormat, ops: Ops) -> int:
    measuring = MeasuringFormat(chosen)
    weights = Weights(measuring, measuring, torch_dtype(config.dtype), ops)
    ARCHITECTURES[config.model.architecture](config.model, weights, 1)
    return measuring.nbytes


def _quantized_twice(config: EngineConfig) -> ConfigError:
    return ConfigError(
        f"{Path(config.model_path).name} is quantized already; --quantization {config.quantization} would lose twice.",
        remedy="Leave --quantization out, or give the bfloat16 or float16 checkpoint.",
        param="quantization",
    )
