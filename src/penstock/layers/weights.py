"""What a model builds its layers from: tensors by name, in the format of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels.ops import Ops
from penstock.layers.linear import Embedding, Linear
from penstock.layers.norm import LayerNorm, RMSNorm
from penstock.quantization import (
    ExpertWeights,
    LinearFormat,
    LinearWeight,
    SeparateExperts,
    StackedExperts,
    TensorSource,
    packed_parts,
)


class Weights:
    """Loads layers. dtype: of the model's activations, biases and norms."""

    def __init__(self, source: TensorSource, linear_format: LinearFormat, dtype: torch.dtype, ops: Ops) -> None:
        self._source = source
        self._format = linear_format
        self._dtype = dtype
        self._ops = ops
        self.held: dict[str, int] = {}  # bytes of matrices by how they are held and multiplied

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self._ops.layouts.device

    def linear(self, names: Sequence[str], num_rows: Sequence[int], num_columns: int, *, bias: bool = False) -> Linear:
        """The linears `names` of `num_rows` outputs each, fused into one."""
        weight = self._matrix(names, num_rows, num_columns)
        if not bias:
            return Linear(weight)
        parts = [self.vector(f"{name}.bias", rows) for name, rows in zip(names, num_rows, strict=True)]
        return Linear(weight, torch.cat(parts))

    def experts(self, names: Sequence[str], count: int, inner_size: int, hidden_size: int) -> ExpertWeights:
        """names: of an expert's gate, up and down, with {expert} where its number stands."""
        gate_up = [[name.format(expert=expert) for name in names[:2]] for expert in range(count)]
        down = [[names[2].format(expert=expert)] for expert in range(count)]

        def load(members: Sequence[Sequence[str]], num_rows: int, num_columns: int) -> LinearWeight:
            flat = [name for each in members for name in each]
            return self._matrix(flat, [num_rows] * len(flat), num_columns)

        if self._ops.layouts.stacks_experts:
            return StackedExperts(load(gate_up, inner_size, hidden_size), load(down, hidden_size, inner_size), count)
        return SeparateExperts(
            [load([each], inner_size, hidden_size) for each in gate_up],
            [load([each], hidden_size, inner_size) for each in down],
        )

    def embedding(self, name: str, num_rows: int, num_columns: int) -> Embedding:
        weight = self._format.load_embedding(self._source, name, num_rows, num_columns, self._ops)
        self._count(weight)
        return Embedding(weight)

    def _matrix(self, names: Sequence[str], num_rows: Sequence[int], num_columns: int) -> LinearWeight:
        weight = self._format.load_linear(self._source, names, num_rows, num_columns, self._ops)
        self._count(weight)
        return weight

    def _count(self, weight: LinearWeight) -> None:
        for packed in packed_parts(weight):
            self.held[packed.held_as] = self.held.get(packed.held_as, 0) + packed.nbytes

    def norm(self, name: str, size: int, eps: float) -> RMSNorm:
        return RMSNorm(self.vector(f"{name}.weight", size), eps)

    def layer_norm(self, name: str, size: int, eps: float) -> LayerNorm:
        return LayerNorm(self.vector(f"{name}.weight", size), self.vector(f"{name}.bias", size), eps)

    def vector(self, name: str, size: int) -> Tensor:
        return self._source.tensor(name, (size,), self._dtype).to(self.device)
