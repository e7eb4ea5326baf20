"""A GGUF file that is written tensor by tensor: which type each gets, and its bytes a piece at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from penstock.base.errors import CheckpointError
from penstock.config.model import ModelConfig
from penstock.conversion.gguf_header import TensorPlan, gguf_header, padding
from penstock.conversion.gguf_metadata import metadata
from penstock.conversion.planned_file import Section, write_file
from penstock.conversion.source_rows import SourceRows
from penstock.kernels.ops import ScaleSearch
from penstock.layers.rotary import inverse_frequencies
from penstock.loader.gguf_checkpoint import ROPE_FACTORS, gguf_name
from penstock.loader.gguf_file import block_of
from penstock.quantization.gguf_encode import MIXTURES, encode, head_name, is_router, k_mixture

# Target -> general.file_type, and the type of most matrices.
GGUF_TARGETS: Final = {
    "f16": (1, "F16"), "bf16": (32, "BF16"), "q8_0": (7, "Q8_0"), "q4_0": (2, "Q4_0"),
    "q2_k": (10, "Q2_K"), "q3_k_m": (12, "Q3_K"), "q4_k_m": (15, "Q4_K"), "q5_k_m": (17, "Q5_K"), "q6_k": (18, "Q6_K"),
}  # fmt: skip


def write_gguf(
    source: Path,
    output: Path,
    target: str,
    rows: SourceRows,
    importance: Mapping[str, Tensor],
    search: ScaleSearch,
    on_progress: Callable[[float], None],
) -> None:
    """importance: of the inputs of a linear (named without suffix), float32 [K]; of those that are not there, none."""
    file_type, _ = GGUF_TARGETS[target]
    values = metadata(source, rows.model, file_type)
    if importance:
        values["quantize.imatrix.entries_count"] = len(importance)
    is_turned = values["general.architecture"] == "llama"
    plans, sections = [], []
    for name in rows.names:
        theirs = gguf_name(name)
        if theirs is None:
            raise CheckpointError(f"GGUF has no place for the tensor {name!r}.")
        stack = _stack(name, rows.model)
        if name != stack[0]:
            continue  # written with the first
        shape = rows.shape(name)
        if len(stack) > 1:
            shape = (len(stack), *shape)
        elif name.endswith(".shared_expert_gate.weight"):
            shape = shape[1:]  # GGUF has this matrix of one row as a vector
        plan = TensorPlan(theirs, _tensor_type(name, rows, target), shape)
        plans.append(plan)
        sections.append(_section(stack, plan, rows, is_turned, importance, search))
    if rows.model.rope.rope_type == "llama3":
        factors = _rope_factors(rows.model)
        plan = TensorPlan(ROPE_FACTORS, "F32", tuple(factors.shape))
        plans.append(plan)
        sections.append(Section(plan.nbytes + padding(plan.nbytes), lambda: [factors.numpy().tobytes()]))
    write_file(output, gguf_header(values, plans), sections, on_progress)


def _stack(name: str, model: ModelConfig) -> list[str]:
    """The experts' tensors that stand in one with `name`, which is the first of them; any other's is itself."""
    parts = re.split(r"(?<=\.experts\.)\d+(?=\.)", name)
    if len(parts) == 1 or model.experts is None:
        return [name]
    return [f"{parts[0]}{expert}{parts[1]}" for expert in range(model.experts.count)]


def _tensor_type(name: str, rows: SourceRows, target: str) -> str:
    """llama.cpp's choice: vectors F32, the head (or the embedding tied to it) and part of the K mixtures finer."""
    shape, (_, kind) = rows.shape(name), GGUF_TARGETS[target]
    model = rows.model
    linear = name.removesuffix(".weight")
    if len(shape) < 2 or is_router(linear):
        return "F32"
    if target in MIXTURES:
        kind = k_mixture(linear, model, target)
    elif target == "q4_0" and linear == head_name(model):
        kind = "Q6_K"
    for fallback in (kind, "Q8_0"):
        if shape[1] % block_of(fallback)[0] == 0:
            return fallback
    return "F16"


def _section(
    names: Sequence[str],
    plan: TensorPlan,
    rows: SourceRows,
    is_turned: bool,
    importance: Mapping[str, Tensor],
    search: ScaleSearch,
) -> Section:
    """names: of one tensor, or of those that are stacked in it."""
    head_dim = rows.model.head_dim
    turns = is_turned and (".q_proj." in names[0] or ".k_proj." in names[0])

    def pieces() -> Iterator[bytes]:
        if len(rows.shape(names[0])) == 1:
            vector = rows.vector(names[0])
            yield (_turned(vector[:, None], head_dim)[:, 0] if turns else vector).contiguous().numpy().tobytes()
            return
        for name in names:
            for piece in rows.pieces(name, head_dim if turns else 1):
                ordered = _turned(piece, head_dim) if turns else piece
                weighed = importance.get(name.removesuffix(".weight"))
                yield encode(plan.tensor_type, ordered, search, weighed).numpy().tobytes()

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
