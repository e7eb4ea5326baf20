"""A checkpoint of a model's body alone, under the names that the body has inside a model with a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.loader.checkpoint import Checkpoint
    from penstock.loader.mapped_tensor import TensorView


class BodyCheckpoint:
    """`checkpoint`, with `prefix` before every name. It is closed by its owner."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self._checkpoint = checkpoint
        self._prefix = prefix

    def names(self) -> set[str]:
        return {self._prefix + name for name in self._checkpoint.names()}

    def __contains__(self, name: str) -> bool:
        return name.startswith(self._prefix) and self._bare(name) in self._checkpoint

    def tensor_type(self, name: str) -> str:
        return self._checkpoint.tensor_type(self._bare(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(self._bare(name))

    def size_bytes(self, name: str) -> int:
        return self._checkpoint.size_bytes(self._bare(name))

    def row_bytes(self, name: str) -> int:
        return self._checkpoint.row_bytes(self._bare(name))

    def read(self, name: str, shape: tuple[int, ...], begin: int = 0, end: int | None = None) -> TensorView:
        return self._checkpoint.read(self._bare(name), shape, begin, end)

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        self._checkpoint.release(self._bare(name), begin, end)

    def close(self) -> None:
        self._checkpoint.close()

    def _bare(self, name: str) -> str:
        return name.removeprefix(self._prefix)
