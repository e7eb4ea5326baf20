"""What a checkpoint's files say about it, for the routes that describe a model. Reads sizes and headers, no weights."""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.base.errors import CheckpointError
from penstock.loader.gguf_file import GGUFFile, split_paths

_MAX_HEADER_BYTES: Final = 100_000_000
_LENGTH_BYTES: Final = 8


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """family: config.json's model_type. modified_s: seconds since 1970 of the newest weights. Zeros: unknown."""

    family: str = ""
    file_format: str = "safetensors"
    size_bytes: int = 0
    num_parameters: int = 0
    modified_s: float = 0.0

    @classmethod
    def read(cls, path: Path, family: str) -> ModelFacts:
        """path: the checkpoint's directory, or its GGUF file."""
        if path.is_file():
            files = split_paths(path)
        else:
            files = [file for file in path.iterdir() if file.suffix == ".safetensors"]
        stats = [file.stat() for file in files]
        return cls(
            family=family,
            file_format="gguf" if path.is_file() else "safetensors",
            size_bytes=sum(stat.st_size for stat in stats),
            num_parameters=sum(_gguf_parameters(file) if path.is_file() else _num_parameters(file) for file in files),
            modified_s=max((stat.st_mtime for stat in stats), default=0.0),
        )


def _gguf_parameters(file: Path) -> int:
    """Elements of all tensors of a GGUF; 0 where it cannot be read (the loader says why)."""
    try:
        with closing(GGUFFile(file)) as opened:
            return sum(math.prod(entry.shape) for entry in opened.tensors.values())
    except CheckpointError:
        return 0


def _num_parameters(file: Path) -> int:
    """Elements of all tensors that a safetensors header lists; 0 where it cannot be read (the loader says why)."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            header = json.loads(stream.read(min(length, _MAX_HEADER_BYTES)))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0
