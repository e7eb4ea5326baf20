"""All tables of a step in one piece of pinned memory, so that they reach the device in one copy.

Owns: the host's buffers and the device's.
Never: writes to a buffer whose copy may still be under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT: Final = 16  # Triton's loads are wide where a pointer is a multiple of this
_TORCH_DTYPES: Final = {
    np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}  # fmt: skip


class Event(Protocol):
    """A point in the device's work (torch.cuda.Event)."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self) -> None:
        """What the device is given from now on comes after it."""
        ...


class Backend(Protocol):
    """What of a device's runtime is needed here (CudaBackend; in tests a fake on the CPU)."""

    device: torch.device

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies from and to by itself."""
        ...

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """In the order of the device's work; returns at once."""
        ...

    def event(self) -> Event: ...

    def beside(self, work: Callable[[], None], after: Event) -> Event:
        """Gives `work` to the device to do beside its steps, after an event and all else done so; returns its end."""
        ...


class Recording(Protocol):
    """Work that the device does again at every `replay`, on the same memory. nbytes: what it took of the device's."""

    nbytes: int

    def replay(self) -> None: ...


class RecordingBackend(Backend, Protocol):
    """The runtime of a device that works by itself."""

    def free_bytes(self) -> int:
        """Of the device, when all that it was given is done."""
        ...

    def is_lost(self) -> bool:
        """Whether everything that it is given from now on will fail. Waits for what it was given."""
        ...

    def release(self) -> None:
        """Leaves memory that is in no use any more to others."""
        ...

    def record(self, run: Callable[[], None]) -> Recording:
        """What `run` gives the device to do. It runs once before, so that nothing is made at its first use."""
        ...


class Staging:
    """Two host buffers of `nbytes`, used in turn, and the device's one: its copies are in the order of its steps."""

    def __init__(self, backend: Backend, nbytes: int) -> None:
        self._backend = backend
        self._hosts = [backend.pinned((nbytes,), torch.uint8) for _ in range(2)]
        self._copied: list[Event | None] = [None, None]
        self._turn = 0
        self._device = torch.empty(nbytes, dtype=torch.uint8, device=backend.device)

    def place(self, arrays: Sequence[NDArray[np.generic]]) -> list[Tensor]:
        """The arrays on the device, valid until the next call's copy (in the device's order)."""
        self._turn = 1 - self._turn
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()
        host = self._hosts[self._turn]
        memory = host.numpy()
        offsets, end = self.offsets(arrays)
        assert end <= host.shape[0], (end, host.shape)
        for array, offset in zip(arrays, offsets, strict=True):
            target = memory[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
            target[...] = array
        self._backend.copy(self._device[:end], host[:end])
        self._copied[self._turn] = event = self._backend.event()
        event.record()
        return [
            self._device[offset : offset + array.nbytes].view(_TORCH_DTYPES[array.dtype]).view(array.shape)
            for array, offset in zip(arrays, offsets, strict=True)
        ]

    @staticmethod
    def offsets(arrays: Sequence[NDArray[np.generic]]) -> tuple[list[int], int]:
        """(first byte of each, bytes together): a function of the shapes alone, so equal shapes lie alike."""
        offsets, end = [], 0
        for array in arrays:
            offsets.append(end)
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        return offsets, end


class Readback:
    """Tensors on their way to the host. `arrays` waits for them."""

    def __init__(self, backend: Backend, tensors: Sequence[Tensor]) -> None:
        self._host = [backend.pinned(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        for destination, source in zip(self._host, tensors, strict=True):
            backend.copy(destination, source)
        self._event = backend.event()
        self._event.record()

    def arrays(self) -> list[NDArray[np.generic]]:
        self._event.synchronize()
        return [tensor.numpy() for tensor in self._host]
