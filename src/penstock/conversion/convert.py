"""From a float checkpoint to a quantised one: rounded as it stands, or as calibration text says.

Without calibration, peak memory is a piece of one tensor: the source is mapped, and the output streamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from penstock.base.errors import CheckpointError, ConfigError
from penstock.config.defaults import machine_facts
from penstock.conversion.calibration import Observer, observe, windows_of
from penstock.conversion.gguf_output import GGUF_TARGETS, write_gguf
from penstock.conversion.journal import Journal
from penstock.conversion.observers import AWQObserver, GPTQObserver, ImportanceObserver
from penstock.conversion.planned_file import Section
from penstock.conversion.recipe import SAFETENSORS_TARGETS, Calibration, Recipe, check_recipe, quantization_config
from penstock.conversion.rounded_linears import w4a16, w8a8
from penstock.conversion.safetensors_output import Entry, plain, write_directory
from penstock.conversion.source_rows import SourceRows
from penstock.kernels import ops as op_table
from penstock.loader import Checkpoint, open_checkpoint, read_model_config
from penstock.quantization import CheckpointSource

TARGETS: Final = (*GGUF_TARGETS, *SAFETENSORS_TARGETS)
_CALIBRATION_SHARE: Final = 0.9  # of the progress, where there is calibration
_PLAIN_RECIPE: Final = Recipe()


def convert(
    source: Path,
    output: Path,
    target: str,
    on_progress: Callable[[float], None],
    recipe: Recipe = _PLAIN_RECIPE,
    calibration: Calibration | None = None,
) -> None:
    """Writes the float checkpoint directory `source` as `output`: a .gguf file, or a directory of safetensors.

    target: one of TARGETS. An interrupted run is continued by the same call. Raises CheckpointError, ConfigError.
    """
    check_recipe(target, recipe, calibration is not None)
    if source.is_file():
        raise CheckpointError(f"{source} is a file.", remedy="Name the directory of the float checkpoint.")
    if target in GGUF_TARGETS and output.suffix != ".gguf":
        raise ConfigError(f"{output} does not end in .gguf.", remedy=f"--to {target} writes a GGUF file.")
    written = output if target in GGUF_TARGETS else output / "model.safetensors"
    if written.exists():
        raise ConfigError(f"{written} is there already.", remedy="Name another output, or remove it.")
    model = read_model_config(source)
    if model.quantization is not None:
        raise CheckpointError(f"{source} is quantised already.", remedy="Name the float checkpoint it was made from.")
    if model.experts is not None and calibration is not None and target not in GGUF_TARGETS:
        raise ConfigError(
            f"--to {target} is not calibrated for mixtures of experts: few tokens reach an expert.",
            remedy="Leave --calibration out with w8a8 or w4a16, or choose a GGUF.",
            param="calibration",
        )
    with closing(open_checkpoint(source)) as checkpoint:
        rows = SourceRows(checkpoint, model)
        if target in ("gptq", "awq"):
            _check_shapes(rows, recipe)
        if calibration is None:
            _write(source, output, target, recipe, rows, None, on_progress)
            return
        journal = _calibrate(
            source, output, target, recipe, rows, calibration, lambda share: on_progress(share * _CALIBRATION_SHARE)
        )
        rest = 1 - _CALIBRATION_SHARE
        _write(
            source, output, target, recipe, rows, journal, lambda share: on_progress(_CALIBRATION_SHARE + share * rest)
        )
        journal.remove()


def _check_shapes(rows: SourceRows, recipe: Recipe) -> None:
    for name in rows.names:
        if is_rounded(name):
            count, columns = rows.shape(name)
            if count % 32 or columns % 32 or columns % recipe.group_size:
                raise CheckpointError(
                    f"{name} is {count} x {columns}: outputs must be a multiple of 32, and inputs of the group size.",
                    remedy="Choose a smaller --group-size, or --to w4a16, which leaves such linears as they are.",
                )


def _calibrate(
    source: Path,
    output: Path,
    target: str,
    recipe: Recipe,
    rows: SourceRows,
    calibration: Calibration,
    on_progress: Callable[[float], None],
) -> Journal:
    windows = windows_of(source, calibration, rows.model)
    about: dict[str, Any] = {
        "target": "gguf" if target in GGUF_TARGETS else target,
        "recipe": recipe._asdict(),
        "tokens": hashlib.sha256(json.dumps(windows).encode()).hexdigest(),
        "model": {file.name: file.stat().st_mtime_ns for file in sorted(source.glob("*.safetensors"))},
    }
    journal = Journal(output.with_name(f"{output.name}.calibration"), about)
    observer: Observer
    if target in GGUF_TARGETS:
        observer = ImportanceObserver(journal)
    elif target == "awq":
        observer = AWQObserver(rows, journal, recipe)
    else:
        observer = GPTQObserver(rows, journal, target, recipe)
    observe(source, rows, windows, observer, on_progress)
    return journal


def _write(
    source: Path,
    output: Path,
    target: str,
    recipe: Recipe,
    rows: SourceRows,
    journal: Journal | None,
    on_progress: Callable[[float], None],
) -> None:
    results = [journal.open(name) for name in journal.names()] if journal is not None else []
    try:
        if target in GGUF_TARGETS:
            kernels = "native" if machine_facts().has_native else "reference"
            search = op_table.load(kernels, torch.get_num_threads()).scale_search
            write_gguf(source, output, target, rows, _importance(results), search, on_progress)
            return
        entries = _found_entries(rows, results) if results else _rounded_entries(rows, target, recipe)
        write_directory(source, output, entries, quantization_config(target, recipe), on_progress)
    finally:
        for result in results:
            result.close()


def _importance(results: list[Checkpoint]) -> dict[str, Tensor]:
    """Of all linears that were seen, by name."""
    found: dict[str, Tensor] = {}
    for result in results:
        source = CheckpointSource(result, lambda _name: True, lambda _share: None)
        found |= {name: source.stored(name, result.shape(name)).clone() for name in result.names()}
    return found


def is_rounded(name: str) -> bool:
    """Whether a tensor is of a linear that targets of integers round: all but embedding, head and routers."""
    return name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


def _rounded_entries(rows: SourceRows, target: str, recipe: Recipe) -> list[Entry]:
    entries: list[Entry] = []
    for name in rows.names:
        if not is_rounded(name):
            entries.append(plain(name, rows))
        elif target == "w8a8":
            entries += w8a8(name, rows)
        else:
            entries += w4a16(name, rows, recipe.group_size)
    return entries


def _found_entries(rows: SourceRows, results: list[Checkpoint]) -> list[Entry]:
    """The journal's tensors, and the others of the model as they are."""
    holders = {name: result for result in results for name in result.names()}
    linears = {name.rsplit(".", 1)[0] for name in holders}
    entries = [_copied(name, holder) for name, holder in sorted(holders.items())]
    for name in rows.names:
        is_replaced = name in holders or (name.endswith(".weight") and name.removesuffix(".weight") in linears)
        if not is_replaced:
            entries.append(plain(name, rows))
    return entries


def _copied(name: str, holder: Checkpoint) -> Entry:
    shape = holder.shape(name)
    section = Section(holder.size_bytes(name), lambda: [holder.read(name, shape).data])
    return Entry(name, holder.tensor_type(name), shape, section)
