"""From a float checkpoint to a quantised one: which type each tensor gets, and its bytes a piece at a time.

Peak memory is a piece of one tensor: the source is mapped, and the output streamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.base.errors import CheckpointError, ConfigError
from penstock.config.model import ModelConfig
from penstock.conversion.gguf_header import TensorPlan, gguf_header, padding
from penstock.conversion.gguf_metadata import metadata
from penstock.conversion.planned_file import Section, write_file
from penstock.layers.rotary import inverse_frequencies
from penstock.loader import Checkpoint, open_checkpoint, read_model_config
from penstock.loader.gguf_checkpoint import ROPE_FACTORS, gguf_name
from penstock.loader.gguf_file import block_of
from penstock.models import is_ignored_tensor
from penstock.quantization import CheckpointSource
from penstock.quantization.gguf_encode import encode, head_name, k_mixture
from penstock.quantization.stored_format import row_pieces

# Target -> general.file_type of a GGUF, and the type of most matrices.
_GGUF_TARGETS: Final = {
    "f16": (1, "F16"), "bf16": (32, "BF16"), "q8_0": (7, "Q8_0"), "q4_0": (2, "Q4_0"), "q4_k_m": (15, "Q4_K"),
}  # fmt: skip
_SAFETENSORS_TARGETS: Final = ("w8a8", "w4a16")
TARGETS: Final = (*_GGUF_TARGETS, *_SAFETENSORS_TARGETS)
_W4_GROUP: Final = 128
_TEXT_FILES: Final = (
    "tokenizer*",
    "special_tokens_map.json",
    "generation_config.json",
    "*.jinja",
    "vocab.json",
    "merges.txt",
)


def convert(source: Path, output: Path, target: str, on_progress: Callable[[float], None]) -> None:
    """Writes the float checkpoint directory `source` as `output`: a .gguf file, or a directory of compressed-tensors.

    target: one of TARGETS. An interrupted run is continued by the same call. Raises CheckpointError, ConfigError.
    """
    if source.is_file():
        raise CheckpointError(f"{source} is a file.", remedy="Name the directory of the float checkpoint.")
    model = read_model_config(source)
    if model.quantization is not None:
        raise CheckpointError(f"{source} is quantised already.", remedy="Name the float checkpoint it was made from.")
    checkpoint = open_checkpoint(source)
    try:
        rows = _Rows(checkpoint, model)
        if target in _GGUF_TARGETS:
            if output.suffix != ".gguf":
                raise ConfigError(f"{output} does not end in .gguf.", remedy=f"--to {target} writes a GGUF file.")
            _write_gguf(source, output, target, rows, on_progress)
        else:
            _write_safetensors(source, output, target, rows, on_progress)
    finally:
        checkpoint.close()


class _Rows:
    """The tensors that a model uses, and their rows as floats."""

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig) -> None:
        self.model = model
        self._checkpoint = checkpoint
        self._source = CheckpointSource(checkpoint, lambda name: True, lambda fraction: None)  # noqa: ARG005
        self.names = sorted(
            (name for name in checkpoint.names() if not is_ignored_tensor(name, model)), key=_model_order
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def stored_type(self, name: str) -> str:
        return self._checkpoint.tensor_type(name)

    def vector(self, name: str) -> Tensor:
        return self._source.tensor(name, self.shape(name), torch.float32)

    def pieces(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """Pieces of a matrix, whole multiples of rows (but for the end), in order; each valid until the next."""
        shape = self.shape(name)
        assert len(shape) == 2, (name, shape)
        begin = 0
        for _, end in row_pieces(shape[0], shape[1]):
            stop = shape[0] if end == shape[0] else end // multiple * multiple
            if stop > begin:
                yield self._source.rows(name, (shape[0], shape[1]), begin, stop)
                self._source.release(name, begin, stop)
                begin = stop


def _model_order(name: str) -> tuple[int, str]:
    parts = name.split(".")
    layer = int(parts[2]) if name.startswith("model.layers.") and parts[2].isdecimal() else -1
    return (layer if layer >= 0 else 10**9 if name.startswith("lm_head") else -1, name)


# GGUF


def _write_gguf(source: Path, output: Path, target: str, rows: _Rows, on_progress: Callable[[float], None]) -> None:
    file_type, _ = _GGUF_TARGETS[target]
    values = metadata(source, rows.model, file_type)
    is_turned = values["general.architecture"] == "llama"
    plans, sections = [], []
    for name in rows.names:
        theirs = gguf_name(name)
        if theirs is None:
            raise CheckpointError(f"GGUF has no place for the tensor {name!r}.")
        plan = TensorPlan(theirs, _tensor_type(name, rows, target), rows.shape(name))
        plans.append(plan)
        sections.append(_gguf_section(name, plan, rows, is_turned))
    if rows.model.rope.rope_type == "llama3":
        factors = _rope_factors(rows.model)
        plan = TensorPlan(ROPE_FACTORS, "F32", tuple(factors.shape))
        plans.append(plan)
        sections.append(Section(plan.nbytes + padding(plan.nbytes), lambda: [factors.numpy().tobytes()]))
    write_file(output, gguf_header(values, plans), sections, on_progress)


def _tensor_type(name: str, rows: _Rows, target: str) -> str:
    """llama.cpp's choice: vectors F32, the head (or the embedding tied to it) and part of the K mixture finer."""
    shape, (_, kind) = rows.shape(name), _GGUF_TARGETS[target]
    if len(shape) < 2:
        return "F32"
    model = rows.model
    linear = name.removesuffix(".weight")
    if target == "q4_k_m" or (target == "q4_0" and linear == head_name(model)):
        kind = k_mixture(linear, model)
    for fallback in (kind, "Q8_0"):
        if shape[1] % block_of(fallback)[0] == 0:
            return fallback
    return "F16"


def _gguf_section(name: str, plan: TensorPlan, rows: _Rows, is_turned: bool) -> Section:
    head_dim = rows.model.head_dim
    turns = is_turned and (".q_proj." in name or ".k_proj." in name)

    def pieces() -> Iterator[bytes]:
        if len(plan.shape) == 1:
            vector = rows.vector(name)
            yield (_turned(vector[:, None], head_dim)[:, 0] if turns else vector).contiguous().numpy().tobytes()
            return
        for piece in rows.pieces(name, head_dim if turns else 1):
            ordered = _turned(piece, head_dim) if turns else piece
            yield encode(plan.tensor_type, ordered).numpy().tobytes()

    return Section(plan.nbytes + padding(plan.nbytes), pieces)


def _turned(rows_RK: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads with rotary pairs side by side, as GGUF's "llama" has them."""
    halves = rows_RK.reshape(-1, 2, head_dim // 2, rows_RK.shape[1])
    return halves.transpose(1, 2).reshape(rows_RK.shape)


def _rope_factors(model: ModelConfig) -> Tensor:
    """How much slower each pair turns than without scaling, float32 [head_dim / 2]."""
    scaled, _ = inverse_frequencies(model.rope, model.head_dim, model.max_position_embeddings, 1)
    plain = model.rope.rope_theta ** -(torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim)
    return plain / scaled


# compressed-tensors


class _Entry(NamedTuple):
    """A tensor of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    section: Section


def _write_safetensors(
    source: Path, output: Path, target: str, rows: _Rows, on_progress: Callable[[float], None]
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    entries: list[_Entry] = []
    for name in rows.names:
        is_linear = name.endswith("_proj.weight")
        if not is_linear:
            entries.append(_plain(name, rows))
        elif target == "w8a8":
            entries += _w8a8(name, rows)
        else:
            entries += _w4a16(name, rows)
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
    config["quantization_config"] = _quantization_config(target)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for pattern in _TEXT_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, output / file.name)


def _plain(name: str, rows: _Rows) -> _Entry:
    """A tensor that stays as it is."""
    shape, kind = rows.shape(name), rows.stored_type(name)
    item = block_of(kind)[1]

    def pieces() -> Iterator[bytes]:
        if len(shape) == 1:
            yield encode(kind, rows.vector(name)[None]).numpy().tobytes()
        else:
            for piece in rows.pieces(name):
                yield piece.contiguous().view(torch.uint8).numpy().tobytes()

    return _Entry(name, kind, shape, Section(int(np.prod(shape)) * item, pieces))


def _w8a8(name: str, rows: _Rows) -> list[_Entry]:
    """Symmetric int8 with a scale an output: q = round(w / scale), scale = the largest magnitude / 127."""
    count, columns = rows.shape(name)

    def scale_of(piece: Tensor) -> Tensor:
        return (piece.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)

    def codes() -> Iterator[bytes]:
        for piece in rows.pieces(name):
            yield (piece.float() / scale_of(piece)).round().clamp(-127, 127).to(torch.int8).numpy().tobytes()

    def scales() -> Iterator[bytes]:
        for piece in rows.pieces(name):
            yield scale_of(piece).numpy().tobytes()

    return [
        _Entry(name, "I8", (count, columns), Section(count * columns, codes)),
        _Entry(f"{name}_scale", "F32", (count, 1), Section(4 * count, scales)),
    ]


def _w4a16(name: str, rows: _Rows) -> list[_Entry]:
    """Symmetric int4 by groups of 128: q = round(w / scale) in -8 to 7, packed eight to a word as q + 8."""
    count, columns = rows.shape(name)
    if columns % _W4_GROUP:
        return [_plain(name, rows)]
    groups = columns // _W4_GROUP

    def scale_of(piece: Tensor) -> Tensor:
        """[R, G, 1], rounded to what is stored."""
        by_group = piece.float().view(-1, groups, _W4_GROUP)
        return (by_group.abs().amax(2, keepdim=True) / 7.5).clamp(min=1e-7).half().float()

    def codes() -> Iterator[bytes]:
        for piece in rows.pieces(name):
            scaled = piece.float().view(-1, groups, _W4_GROUP) / scale_of(piece)
            nibbles = (scaled.round().clamp(-8, 7) + 8).to(torch.uint8).view(-1, columns // 2, 2)
            yield (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).numpy().tobytes()

    def scales() -> Iterator[bytes]:
        for piece in rows.pieces(name):
            yield scale_of(piece).half().numpy().tobytes()

    stem = name.removesuffix(".weight")
    shape = np.array([count, columns], np.int64).tobytes()
    return [
        _Entry(f"{stem}.weight_packed", "I32", (count, columns // 8), Section(count * columns // 2, codes)),
        _Entry(f"{stem}.weight_scale", "F16", (count, groups), Section(2 * count * groups, scales)),
        _Entry(f"{stem}.weight_shape", "I64", (2,), Section(16, lambda: [shape])),
    ]


def _quantization_config(target: str) -> dict[str, Any]:
    is_w8a8 = target == "w8a8"
    weights = {
        "num_bits": 8 if is_w8a8 else 4, "type": "int", "symmetric": True, "dynamic": False,
        "strategy": "channel" if is_w8a8 else "group", "group_size": None if is_w8a8 else _W4_GROUP,
        "observer": "minmax",
    }  # fmt: skip
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    name = "int-quantized" if is_w8a8 else "pack-quantized"
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if is_w8a8 else None,
        "format": name,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
