"""Where a step's tensors lie, and how the host hears of what was drawn: at once on the CPU, later on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.layers import AttentionMetadata
from penstock.runner.staging import Backend, Event
from penstock.runner.step_tables import DrawInputs, DrawTables, StepInputs, StepTables


class StepDevice(Protocol):
    """is_asynchronous: what is launched runs later, and the host goes on. backend: its runtime."""

    is_asynchronous: bool
    backend: Backend

    def place(self, tables: StepTables, draw: DrawTables | None) -> StepInputs:
        """The tables on the device."""
        ...

    def send(self, array: NDArray[np.generic]) -> Tensor:
        """A copy on the device, without waiting."""
        ...


class HostBackend:
    """The CPU as a device (staging.Backend): what it is given is done when it is given."""

    device = torch.device("cpu")

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
    """The CPU: tables are wrapped, not copied."""

    is_asynchronous = False

    def __init__(self) -> None:
        self.backend: Backend = HostBackend()

    def place(self, tables: StepTables, draw: DrawTables | None) -> StepInputs:
        metadata = AttentionMetadata(
            query_starts=torch.from_numpy(tables.query_starts),
            context_lens=torch.from_numpy(tables.context_lens),
            block_tables=torch.from_numpy(tables.block_tables),
            slot_mapping=torch.from_numpy(tables.slot_mapping),
            token_types=torch.from_numpy(tables.token_types) if tables.token_types is not None else None,
        )
        return StepInputs(
            torch.from_numpy(tables.token_ids),
            torch.from_numpy(tables.positions),
            metadata,
            torch.from_numpy(tables.last_tokens),
            DrawInputs(*map(torch.from_numpy, draw)) if draw is not None else None,
        )

    def send(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array)
