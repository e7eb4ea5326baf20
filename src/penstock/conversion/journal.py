"""What a long calibration has found so far, kept on disk so that an interrupted run goes on where it stopped.

A folder for each result, with a model.safetensors: results are read back as a checkpoint is, mapped.

Owns: OUT.calibration, until OUT is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_file
from torch import Tensor

from penstock.base.errors import ConfigError
from penstock.loader import Checkpoint, open_checkpoint

_ABOUT: Final = "about.json"


class Journal:
    """Results by name. about: what they depend on. Raises ConfigError when the folder is of something else."""

    def __init__(self, directory: Path, about: Mapping[str, Any]) -> None:
        self._directory = directory
        text = json.dumps(about, sort_keys=True)
        file = directory / _ABOUT
        if file.is_file():
            if file.read_text(encoding="utf-8") != text:
                raise ConfigError(
                    f"{directory} holds results of a run with another model, text or options.",
                    remedy="Remove it, or repeat that run as it was.",
                )
            return
        directory.mkdir(parents=True, exist_ok=True)
        _write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))

    def __contains__(self, name: str) -> bool:
        return (self._directory / name / "model.safetensors").is_file()

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """All tensors of a result, or after a kill none."""
        folder = self._directory / name
        folder.mkdir(exist_ok=True)
        _write_whole(folder / "model.safetensors", lambda part: save_file(tensors, part, metadata={"format": "pt"}))

    def open(self, name: str) -> Checkpoint:
        """A result, to be closed by the caller."""
        return open_checkpoint(self._directory / name)

    def names(self) -> list[str]:
        return sorted(folder.name for folder in self._directory.iterdir() if folder.name in self)

    def remove(self) -> None:
        shutil.rmtree(self._directory)


def _write_whole(file: Path, write: Any) -> None:
    part = file.with_name(f"{file.name}.part")
    write(part)
    part.replace(file)
