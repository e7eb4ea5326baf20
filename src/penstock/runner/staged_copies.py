"""A package's bytes on their way to a device: two pieces of host memory in turn, one filled while the other is copied.

Owns: the pieces.
Never: waits for a copy before its piece is needed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from penstock.runner.async_device import CudaBackend
from penstock.runner.staging import Backend, Event
from penstock.runner.step_device import HostBackend

PIECE_BYTES: Final = 32 << 20


class StagedCopies:
    """What is filled is there for all that the device is given afterwards. Not run on a GPU yet."""

    def __init__(self, backend: Backend, piece_bytes: int = PIECE_BYTES) -> None:
        self._backend = backend
        self._pieces = [backend.pinned((piece_bytes,), torch.uint8) for _ in range(2)]
        self._ends: list[Event | None] = [None, None]
        self._turn = 0

    def fill(self, target: Tensor, read: Callable[[int, memoryview], None]) -> None:
        """See packaged.Staging."""
        nbytes, piece_bytes = target.shape[0], self._pieces[0].shape[0]
        for begin in range(0, nbytes, piece_bytes):
            end, self._turn = min(begin + piece_bytes, nbytes), 1 - self._turn
            copied = self._ends[self._turn]
            if copied is not None:
                copied.synchronize()
            piece = self._pieces[self._turn][: end - begin]
            read(begin, piece.numpy().data)
            self._backend.copy(target[begin:end], piece)
            copied = self._ends[self._turn] = self._backend.event()
            copied.record()


def staging_for(device: torch.device) -> StagedCopies | None:
    """None: the host's own memory is filled by the file."""
    if device.type == "cpu":
        return None
    return StagedCopies(CudaBackend(device) if device.type == "cuda" else HostBackend(device))
