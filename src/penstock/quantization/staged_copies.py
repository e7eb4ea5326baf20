"""A package's bytes on their way to a device: two pieces of host memory in turn, one filled while the other is copied.

Owns: the pieces.
Never: waits for a copy before its piece is needed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

PIECE_BYTES: Final = 32 << 20


class DeviceCopies:
    """Copies to one device: beside the host from pinned memory to CUDA, at once to others. Not run on a GPU yet."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def memory(self, nbytes: int) -> Tensor:
        """That copies are made from, uint8."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._is_cuda)

    def start(self, destination: Tensor, source: Tensor) -> Callable[[], object]:
        """Starts a copy. What it returns waits for its end."""
        destination.copy_(source, non_blocking=self._is_cuda)
        if not self._is_cuda:
            return _done
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        waiting: Callable[[], object] = event.synchronize
        return waiting


class StagedCopies:
    """What is filled is there for all that the device is given afterwards."""

    def __init__(self, copies: DeviceCopies, piece_bytes: int = PIECE_BYTES) -> None:
        self._copies = copies
        self._pieces = [copies.memory(piece_bytes) for _ in range(2)]
        self._ends: list[Callable[[], object]] = [_done, _done]
        self._turn = 0

    def fill(self, target: Tensor, read: Callable[[int, memoryview], None]) -> None:
        """target: flat uint8 on the device. read(offset, memory): fills memory with the bytes from there on."""
        nbytes, piece_bytes = target.shape[0], self._pieces[0].shape[0]
        for begin in range(0, nbytes, piece_bytes):
            end, self._turn = min(begin + piece_bytes, nbytes), 1 - self._turn
            self._ends[self._turn]()
            piece = self._pieces[self._turn][: end - begin]
            read(begin, piece.numpy().data)
            self._ends[self._turn] = self._copies.start(target[begin:end], piece)


def staging_for(device: torch.device) -> StagedCopies | None:
    """None: the host's own memory is filled by the file."""
    return None if device.type == "cpu" else StagedCopies(DeviceCopies(device))


def _done() -> None:
    """Of a copy that is over, or of none."""
