"""Where a step's tensors lie, and how the host hears of what was drawn: at once on the CPU, later on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.ops import HOST
from penstock.layers import AttentionMetadata
from penstock.runner.staging import Backend, Event
from penstock.runner.step_tables import DrawInputs, DrawTables, StepInputs, StepTables


class StepDevice(Protocol):
    """is_asynchronous: what is launched runs later, and the host goes on. backend: its runtime."""

    is_asynchronous: bool

    @property
    def backend(self) -> Backend: ...

    def place(self, tables: StepTables, draw: DrawTables | None) -> StepInputs:
        """The tables on the device."""
        ...

    def send(self, array: NDArray[np.generic]) -> Tensor:
        """A copy where draws are made, without waiting."""
        ...


class HostBackend:
    """The CPU, or a device that is waited for (staging.Backend): what it is given is done when it is given."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def copy(self, destination: Tensor, source: Tensor) -> None:
        destination.copy_(source)

    def event(self) -> Event:
        return _Done()

    def beside(self, work: Callable[[], None], after: Event) -> Event:
        after.synchronize()
        work()
        return _Done()


class _Done:
    """An event that is over."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self) -> None: ...


class HostDevice:
    """The CPU: tables are wrapped, not copied. On another device the model alone computes there, and is waited for;
    what it takes to draw, and the draw, stay on the host."""

    is_asynchronous = False

    def __init__(self, device: torch.device = HOST) -> None:
        self.backend: Backend = HostBackend(device)

    def place(self, tables: StepTables, draw: DrawTables | None) -> StepInputs:
        metadata = AttentionMetadata(
            query_starts=self._placed(tables.query_starts),
            context_lens=self._placed(tables.context_lens),
            block_tables=self._placed(tables.block_tables),
            slot_mapping=self._placed(tables.slot_mapping),
            token_types=self._placed(tables.token_types) if tables.token_types is not None else None,
        )
        return StepInputs(
            self._placed(tables.token_ids),
            self._placed(tables.positions),
            metadata,
            self._placed(tables.last_tokens),
            DrawInputs(*map(torch.from_numpy, draw)) if draw is not None else None,
        )

    def _placed(self, array: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.backend.device.type == HOST.type else tensor.to(self.backend.device)

    def send(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array)
