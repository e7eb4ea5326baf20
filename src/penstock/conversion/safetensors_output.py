"""A safetensors directory that is written tensor by tensor, with config.json and the tokenizer's files beside it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from penstock.conversion.planned_file import Section, write_file
from penstock.conversion.source_rows import SourceRows
from penstock.loader.gguf_file import block_of
from penstock.quantization.gguf_encode import float_bytes

_TEXT_FILES: Final = (
    "tokenizer*",
    "special_tokens_map.json",
    "generation_config.json",
    "*.jinja",
    "vocab.json",
    "merges.txt",
)


class Entry(NamedTuple):
    """A tensor of a safetensors file. dtype: as the format spells it ("BF16", "I32")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    section: Section


def write_directory(
    source: Path,
    output: Path,
    entries: Sequence[Entry],
    quantization: dict[str, Any],
    on_progress: Callable[[float], None],
) -> None:
    """Writes `output`, whose config.json is that of `source` and says how linears are quantised."""
    output.mkdir(parents=True, exist_ok=True)
    header, offset = {}, 0
    for entry in entries:
        end = offset + entry.section.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    sections = [entry.section for entry in entries]
    write_file(output / "model.safetensors", len(text).to_bytes(8, "little") + text, sections, on_progress)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for pattern in _TEXT_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, output / file.name)


def plain(name: str, rows: SourceRows) -> Entry:
    """A tensor that stays as it is."""
    shape, kind = rows.shape(name), rows.stored_type(name)

    def pieces() -> Iterator[bytes]:
        if len(shape) == 1:
            yield float_bytes(kind, rows.vector(name)[None]).numpy().tobytes()
        else:
            for piece in rows.pieces(name):
                yield piece.contiguous().view(torch.uint8).numpy().tobytes()

    return Entry(name, kind, shape, Section(math.prod(shape) * block_of(kind)[1], pieces))
