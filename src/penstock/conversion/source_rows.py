"""The float checkpoint that is converted: the tensors its model uses, and their rows a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from penstock.config.model import ModelConfig
from penstock.loader import Checkpoint
from penstock.models import is_ignored_tensor
from penstock.quantization import CheckpointSource
from penstock.quantization.stored_format import row_pieces


class SourceRows:
    """names: of the tensors that the model uses, in its order."""

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig) -> None:
        self.model = model
        self._checkpoint = checkpoint
        self.source = CheckpointSource(checkpoint, lambda _name: True, lambda _fraction: None)
        self.names = sorted(
            (name for name in checkpoint.names() if not is_ignored_tensor(name, model)), key=_model_order
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def stored_type(self, name: str) -> str:
        return self._checkpoint.tensor_type(name)

    def vector(self, name: str) -> Tensor:
        return self.source.tensor(name, self.shape(name), torch.float32)

    def matrix(self, name: str) -> Tensor:
        """All rows, float32 [N, K]."""
        return torch.cat([piece.float() for piece in self.pieces(name)])

    def pieces(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """Pieces of a matrix, whole multiples of rows (but for the end), in order; each valid until the next."""
        shape = self.shape(name)
        assert len(shape) == 2, (name, shape)
        begin = 0
        for _, end in row_pieces(shape[0], shape[1]):
            stop = shape[0] if end == shape[0] else end // multiple * multiple
            if stop > begin:
                yield self.source.rows(name, (shape[0], shape[1]), begin, stop)
                self.source.release(name, begin, stop)
                begin = stop


def _model_order(name: str) -> tuple[int, str]:
    parts = name.split(".")
    layer = int(parts[2]) if name.startswith("model.layers.") and parts[2].isdecimal() else -1
    return (layer if layer >= 0 else 10**9 if name.startswith("lm_head") else -1, name)
