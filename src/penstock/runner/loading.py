"""From a configuration to a model with its weights.

Owns: nothing.
Never: reads a weight before the memory plan has been accepted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import torch

from penstock.base.errors import CheckpointError, ConfigError
from penstock.config.engine import EngineConfig
from penstock.kernels.layouts import Layouts
from penstock.kernels.ops import Ops
from penstock.kernels.quantized import SUPER_GROUP
from penstock.layers import Weights
from penstock.loader import (
    BodyCheckpoint,
    Checkpoint,
    GGUFCheckpoint,
    PackageManifest,
    PackageReader,
    PackageWriter,
    is_package,
    open_checkpoint,
)
from penstock.loader.package import FORMAT_VERSION, write_graph_shapes
from penstock.models import ARCHITECTURES, LanguageModel, base_prefix, is_ignored_tensor
from penstock.quantization import (
    CheckpointSource,
    DummySource,
    GGUFFormat,
    LinearFormat,
    OnlineFormat,
    RoundedFormat,
    StoredFormat,
    TensorSource,
    UnquantizedFormat,
    hub_format,
)
from penstock.quantization.gguf_encode import head_name
from penstock.quantization.measuring import MeasuringFormat
from penstock.quantization.packaged import PackagedFormat, PackagedSource, RecordingFormat, RecordingSource
from penstock.runner.graph_policy import GraphLimits, usual_shapes
from penstock.runner.staged_copies import staging_for

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def torch_dtype(name: str) -> torch.dtype:
    return _DTYPES[name]


def linear_format(config: EngineConfig, checkpoint: Checkpoint | None) -> StoredFormat:
    """The format of the checkpoint's linears (None: of random weights), rounded further where that was asked for.

    Raises ConfigError where a wish would change nothing.
    """
    stored = _stored_format(config, checkpoint)
    floats = None if config.quantization is None else OnlineFormat(stored.dtype, config.quantization, config.model)
    chosen: StoredFormat = floats or stored
    if checkpoint is not None and not isinstance(stored, UnquantizedFormat):
        chosen = _rounded(config, stored, floats, checkpoint)
    if config.activations == "int8" and not _has_int8_products(config, chosen, checkpoint):
        raise ConfigError(
            f"--activations int8 could round no inputs of {Path(config.model_path).name}: its weights are no integers.",
            remedy="Leave --activations out, or round the weights, too: --quantization int8.",
            param="activations",
        )
    return chosen


def _rounded(
    config: EngineConfig, stored: StoredFormat, floats: OnlineFormat | None, checkpoint: Checkpoint
) -> StoredFormat:
    """A quantised checkpoint's format, with what was asked for on top."""
    if floats is None and config.activations is None:
        return stored
    chosen = RoundedFormat(stored, floats, rounds_activations=config.activations == "int8")
    if floats is not None and not chosen.rounds_any(_matrices(checkpoint)):
        raise ConfigError(
            f"{Path(config.model_path).name} has no linear left in floats: --quantization {config.quantization} would "
            "change nothing, since what is quantized stays as it is stored.",
            remedy="Leave --quantization out, or give the bfloat16 or float16 checkpoint.",
            param="quantization",
        )
    return chosen


def _stored_format(config: EngineConfig, checkpoint: Checkpoint | None) -> StoredFormat:
    """How the checkpoint itself holds its linears."""
    dtype = torch_dtype(config.dtype)
    if checkpoint is None:
        return UnquantizedFormat(dtype)
    types = {name: checkpoint.tensor_type(name) for name in checkpoint.names()}
    if isinstance(checkpoint, GGUFCheckpoint):
        return GGUFFormat(dtype, types)
    stored = config.model.quantization
    return UnquantizedFormat(dtype) if stored is None else hub_format(dtype, stored, types)


def _has_int8_products(config: EngineConfig, chosen: StoredFormat, checkpoint: Checkpoint | None) -> bool:
    names = checkpoint.names() if checkpoint is not None else [f"{head_name(config.model)}.weight"]
    layouts = (chosen.layout(name.rpartition(".")[0], SUPER_GROUP) for name in names)
    return any(layout is not None and layout.activations == "int8" for layout in layouts)


def _matrices(checkpoint: Checkpoint) -> dict[str, int]:
    """The inputs of what may be a linear, by its name without suffix."""
    names = [name for name in checkpoint.names() if name.endswith(".weight") and len(checkpoint.shape(name)) == 2]
    return {name.removesuffix(".weight"): checkpoint.shape(name)[1] for name in names}


def weights_nbytes(config: EngineConfig, ops: Ops) -> int:
    """Bytes the weights will take: the model's own constructor runs, on nothing.

    Only the headers of quantised checkpoints are read: of floats, the configuration says it all.
    """
    if _is_package(config):
        with closing(open_package(config, ops.layouts)) as package:
            return _measure(config, PackagedFormat(package), ops)
    if config.model.quantization is None and not Path(config.model_path).is_file():
        return _measure(config, linear_format(config, None), ops)
    with _opened(config) as checkpoint:
        return _measure(config, linear_format(config, checkpoint), ops)


def load_model(
    config: EngineConfig,
    ops: Ops,
    on_progress: Callable[[float], None],
    on_loaded: Callable[[float, Mapping[str, int]], None] = lambda _packing_s, _held: None,
) -> LanguageModel:
    """Builds the model. Raises CheckpointError.

    on_loaded: gets the seconds that packing the linears took, and their bytes by how they are held (Weights.held).
    """
    if _is_package(config):
        with closing(open_package(config, ops.layouts)) as package:
            packed = PackagedFormat(package, _fractions(package, on_progress), staging_for(ops.layouts.device))
            model, held = _build(config, PackagedSource(package), packed, ops)
            on_loaded(0.0, held)
            return model
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
        chosen.report_widened()
        model, held = _build(config, source, chosen, ops)
        on_loaded(chosen.packing_s, held)
    _trim_heap()
    return model


def _trim_heap() -> None:
    """Gives the system what was freed of pieces of weights: glibc would keep it, 200 MB of a 1B model in 4 bits."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def write_package(config: EngineConfig, ops: Ops, output: Path, on_progress: Callable[[float], None]) -> None:
    """Packs the weights as an engine of this configuration would, into the package at `output`.

    Raises CheckpointError, ConfigError; then nothing of the package is left.
    """
    with _opened(config) as checkpoint:
        assert checkpoint is not None
        writer = PackageWriter(output, len(checkpoint.names()))
        try:
            chosen = linear_format(config, checkpoint)
            source = CheckpointSource(
                checkpoint, lambda name: is_ignored_tensor(name, config.model) or chosen.ignores(name), on_progress
            )
            _build(config, RecordingSource(source, writer), RecordingFormat(chosen, writer), ops)
            manifest = PackageManifest(
                format_version=FORMAT_VERSION, layouts=ops.layouts.version, isa=ops.isa, dtype=config.dtype,
                quantization=config.quantization, activations=config.activations,
            )  # fmt: skip
            writer.finish(manifest)
            if config.kernels == "triton":
                write_graph_shapes(output, usual_shapes(GraphLimits.of(config)))
        except BaseException:
            writer.abandon()
            raise


def open_package(config: EngineConfig, layouts: Layouts) -> PackageReader:
    """Raises CheckpointError, ConfigError when it was compiled for something else."""
    path = Path(config.model_path)
    reader = PackageReader(path)
    manifest = reader.manifest
    if manifest.layouts != layouts.version:
        reader.close()
        raise CheckpointError(
            f"{path.name} was compiled for the kernels' layout {manifest.layouts}; this engine's is {layouts.version}.",
            remedy="Compile the model again with this version, for this device, or serve the checkpoint itself.",
        )
    for name in ("dtype", "quantization", "activations"):
        wanted, held = getattr(config, name), getattr(manifest, name)
        if wanted not in (None, held):
            reader.close()
            raise ConfigError(
                f"{path.name} was compiled with {name} {held or 'not set'}, and {wanted} was asked for.",
                remedy=f"Leave --{name} out, or compile the model again.",
                param=name,
            )
    return reader


def _is_package(config: EngineConfig) -> bool:
    return config.load_format != "dummy" and is_package(Path(config.model_path))


def _build(
    config: EngineConfig, source: TensorSource, chosen: LinearFormat, ops: Ops
) -> tuple[LanguageModel, Mapping[str, int]]:
    weights = Weights(source, chosen, torch_dtype(config.dtype), ops)
    model = ARCHITECTURES[config.model.architecture](config.model, weights, config.scheduler.max_model_len)
    source.finish()
    return model, weights.held


def _fractions(package: PackageReader, on_progress: Callable[[float], None]) -> Callable[[int], None]:
    """Called with the bytes of each entry that was read; passes on the share of all."""
    total, done = max(sum(entry.nbytes for entry in package.manifest.entries.values()), 1), 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(min(done / total, 1.0))

    return advance


@contextmanager
def _opened(config: EngineConfig) -> Iterator[Checkpoint | None]:
    if config.load_format == "dummy":
        yield None
        return
    with closing(open_checkpoint(Path(config.model_path))) as checkpoint:
        prefix = base_prefix(config.model.architecture)
        is_whole = any(name.startswith(prefix) for name in checkpoint.names())
        yield checkpoint if is_whole else BodyCheckpoint(checkpoint, prefix)


def _measure(config: EngineConfig, chosen: LinearFormat, ops: Ops) -> int:
    measuring = MeasuringFormat(chosen)
    weights = Weights(measuring, measuring, torch_dtype(config.dtype), ops)
    ARCHITECTURES[config.model.architecture](config.model, weights, 1)
    return measuring.nbytes
