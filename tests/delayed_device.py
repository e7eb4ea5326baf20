"""A device that works by itself, acted out on the CPU: its results are garbage until the host has waited for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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

    def wait(self) -> None:
        """Of work beside the steps: it is done now, as late as it may be."""
        self._backend.catch_up(self)


class DelayedBackend:
    """log: "up" for each copy to the device, "down" for each piece of results that the host waited for."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.waiting: list[Callable[[], object]] = []
        self.pinned_memory: dict[int, Tensor] = {}  # kept: an address must not be given out again
        self.log: list[str] = []
        self.card_bytes = 0
        self.taken_bytes: Callable[[], int] = lambda: 0
        self.beside_work: list[tuple[DelayedEvent, Callable[[], None]]] = []
        self.is_beside = False
        self.is_recording = False
        self.is_gone = False
        self.num_released = 0
        self.failures: list[Exception] = []  # the next recordings fail with these

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert not self.is_recording
        memory = torch.full(shape, GARBAGE if dtype == torch.int64 else 77, dtype=dtype)
        self.pinned_memory[memory.untyped_storage().data_ptr()] = memory
        return memory

    def copy(self, destination: Tensor, source: Tensor) -> None:
        assert not self.is_recording
        if self.is_beside:
            destination.copy_(source)
            return
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
        assert not self.is_recording
        return DelayedEvent(self)

    def beside(self, work: Callable[[], None], after: DelayedEvent) -> DelayedEvent:
        end = DelayedEvent(self)
        self.beside_work.append((end, work))
        return end

    def catch_up(self, end: DelayedEvent) -> None:
        """Does the work beside the steps up to and with the one that `end` is the end of."""
        assert any(event is end for event, _ in self.beside_work), "waited for twice, or for nothing"
        self.is_beside = True
        while self.beside_work:
            event, work = self.beside_work.pop(0)
            self.log.append(work.func.__name__ if isinstance(work, partial) else "beside")
            work()
            if event is end:
                break
        self.is_beside = False

    def free_bytes(self) -> int:
        return self.card_bytes - self.taken_bytes()

    def is_lost(self) -> bool:
        return self.is_gone

    def release(self) -> None:
        self.num_released += 1

    def record(self, run: Callable[[], None]) -> DelayedRecording:
        run()
        if self.failures:
            raise self.failures.pop()
        self.is_recording = True
        try:
            with NothingIsReadBack():
                run()
        finally:
            self.is_recording = False
        self.log.append("record")
        return DelayedRecording(self, run)


class DelayedRecording:
    """Does the same on the same memory again."""

    nbytes = 1 << 20

    def __init__(self, backend: DelayedBackend, run: Callable[[], None]) -> None:
        self._backend = backend
        self._run = run

    def replay(self) -> None:
        self._backend.log.append("replay")
        with NothingIsReadBack():
            self._run()


class NothingIsReadBack(TorchDispatchMode):
    """What a graph cannot hold: the host asking what a tensor holds, or a shape that follows from it."""

    FORBIDDEN: ClassVar = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique2"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert str(func.overloadpacket) not in self.FORBIDDEN, func
        return func(*args, **(kwargs or {}))


def delayed_device(config: EngineConfig, backend: DelayedBackend) -> AsyncDevice:
    limits = config.scheduler
    nbytes = table_nbytes(limits.max_num_seqs, limits.max_num_batched_tokens, -(-limits.max_model_len // 16))
    return AsyncDevice(backend, limits.max_num_seqs, nbytes)
