"""A device that works by itself, acted out on the CPU: its results are garbage until the host has waited for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from penstock.config.engine import EngineConfig
from penstock.runner.async_device import AsyncDevice, table_nbytes

GARBAGE = -(2**40)


class DelayedEvent:
    """Copies to the host that came before it are made when it is waited for."""

    def __init__(self, backend: DelayedBackend) -> None:
        self._backend = backend
        self._copies: list[Callable[[], object]] = []

    def record(self) -> None:
        self._copies, self._backend.waiting = self._backend.waiting, []

    def synchronize(self) -> None:
        for copy in self._copies:
            copy()
        self._copies = []


class DelayedBackend:
    """log: "up" for each copy to the device, "down" for each piece of results that the host waited for."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.waiting: list[Callable[[], object]] = []
        self.pinned_memory: dict[int, Tensor] = {}  # kept: an address must not be given out again
        self.log: list[str] = []

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = torch.full(shape, GARBAGE if dtype == torch.int64 else 77, dtype=dtype)
        self.pinned_memory[memory.untyped_storage().data_ptr()] = memory
        return memory

    def copy(self, destination: Tensor, source: Tensor) -> None:
        if destination.untyped_storage().data_ptr() not in self.pinned_memory:
            self.log.append("up")
            destination.copy_(source)
            return
        kept = source.clone()

        def arrive() -> None:
            self.log.append("down")
            destination.copy_(kept)

        self.waiting.append(arrive)

    def event(self) -> DelayedEvent:
        return DelayedEvent(self)


def delayed_device(config: EngineConfig, backend: DelayedBackend) -> AsyncDevice:
    limits = config.scheduler
    nbytes = table_nbytes(limits.max_num_seqs, limits.max_num_batched_tokens, -(-limits.max_model_len // 16))
    return AsyncDevice(backend, limits.max_num_seqs, nbytes)
