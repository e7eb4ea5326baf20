"""`penstock compile`: a checkpoint to a package whose weights are packed already, to start from in seconds."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec

from penstock.base.errors import CheckpointError, ConfigError
from penstock.cli.checkpoint import engine_config, find_checkpoint
from penstock.cli.progress import ShareBar
from penstock.config.model import ModelConfig
from penstock.config.settings import ResolvedSettings, format_size
from penstock.loader import GGUFCheckpoint
from penstock.loader.package import GGUF_TEXT

# What says how the model's text works, and what it is for; never its weights, and no code.
_COPIED: Final = (".json", ".jinja", ".txt", ".model")
_INDEX: Final = ".safetensors.index.json"
_MAX_FILE_BYTES: Final = 256 << 20


def compile_model(resolved: ResolvedSettings, output: Path) -> int:
    """The exit status. Raises CheckpointError, ConfigError."""
    path = find_checkpoint(resolved.values)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not empty.", remedy="Name a new directory.", param="output")
    config = engine_config(resolved.values, path)
    if path.is_file():
        check_gguf(path)
    if config.load_format == "dummy":
        raise ConfigError("Random weights need no package.", remedy="Leave --load-format out.", param="load_format")
    import torch

    from penstock.kernels import ops as op_table
    from penstock.kernels.devices import open_device
    from penstock.loader.package import WEIGHTS
    from penstock.runner.loading import write_package

    started = time.perf_counter()
    torch.set_num_threads(config.num_threads)
    ops = op_table.load(config.kernels, config.num_threads, device=open_device(config.device))
    output.mkdir(parents=True, exist_ok=True)
    bar = ShareBar("pack")
    write_package(config, ops, output, bar.show)
    bar.close()
    if path.is_file():
        write_gguf_text(path, output)
    else:
        copy_text_files(path, output)
    size, seconds = format_size((output / WEIGHTS).stat().st_size), time.perf_counter() - started
    print(f"{output}: {size} in {seconds:.1f} s, for {ops.layouts.version}. Serve it with `penstock serve {output}`.")
    return 0


def check_gguf(path: Path) -> None:
    """Raises CheckpointError where a config.json cannot say what the file does."""
    with closing(GGUFCheckpoint(path)) as checkpoint:
        if ModelConfig.from_hf(checkpoint.config_json()) != checkpoint.model_config():
            raise CheckpointError(
                f"{path.name} has biases that a config.json has no word for.", remedy="Serve the file itself."
            )


def write_gguf_text(source: Path, output: Path) -> None:
    """What a GGUF says of model and text, as a config.json and a GGUF without tensors."""
    with closing(GGUFCheckpoint(source)) as checkpoint:
        (output / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(checkpoint.config_json())) + b"\n")
        (output / GGUF_TEXT).write_bytes(checkpoint.head.without_tensors())


def copy_text_files(source: Path, output: Path) -> None:
    """Tokenizer, templates and configurations, also those in folders of sentence-transformers."""
    for file in sorted([*source.glob("*"), *source.glob("*/*")]):
        is_wanted = file.suffix in _COPIED and not file.name.endswith(_INDEX)
        if is_wanted and file.is_file() and file.stat().st_size <= _MAX_FILE_BYTES:
            target = output / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
