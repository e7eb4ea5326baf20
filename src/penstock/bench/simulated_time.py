"""An event loop whose time jumps to the next timer: what waits for seconds takes none, and every time is exact."""

from __future__ import annotations

import asyncio
import gc
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _JumpingSelector(selectors.SelectSelector):
    """Never waits: the time that it was to wait passes at once."""

    loop: SimulatedLoop

    def select(self, timeout: float | None = None) -> Any:
        loop = self.loop
        if timeout != 0 and loop.work is not None:
            loop.work()
        elif timeout is not None:
            loop.simulated_s += timeout
        else:
            raise RuntimeError("deadlock: nothing is due, and nothing can come")
        # Nothing comes from outside but calls of other threads; asking the system each time would cost as much as all
        # the rest.
        return ()


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Owns: simulated_s, the time.

    work: what goes on while nothing is due, if anything does. It adds to the time, and returns when something is due.
    """

    # asyncio's own, which it does not show
    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]

    def __init__(self) -> None:
        self.simulated_s = 1000.0
        self.work: Callable[[], None] | None = None
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.simulated_s

    def is_anything_due(self) -> bool:
        """Whether something is to run before more time may pass."""
        return bool(self._ready) or (bool(self._scheduled) and self._scheduled[0].when() <= self.simulated_s)


def simulate(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs it on a simulated loop. Garbage is collected afterwards: a run makes no cycles, but much to walk through."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
            return runner.run(main())
    finally:
        if was_on:
            gc.enable()
