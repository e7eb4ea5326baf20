"""Where the seconds of a start went: phases that follow one another, so that they sum to the wall time.

Owns: the list of phases of one start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


class PhaseTimer:
    """`begin` ends the phase before it; every second since `origin_s` belongs to exactly one phase.

    origin_s: on `clock`, when the first phase began, which may be before this object was made (a process start).
    """

    def __init__(
        self, first: str, origin_s: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self._origin_s = clock() if origin_s is None else origin_s
        self._since_s = self._origin_s
        self._current = first
        self._phases: list[tuple[str, float]] = []

    def begin(self, name: str) -> None:
        self._close()
        self._current = name

    def end(self, parts: Sequence[tuple[str, float]] = ()) -> None:
        """Ends the current phase. parts: what another process measured inside it; the rest stays with the phase."""
        self._close(parts)
        self._current = ""

    @property
    def phases(self) -> list[tuple[str, float]]:
        """(name, seconds) in order, of the phases that have ended."""
        return list(self._phases)

    @property
    def total_s(self) -> float:
        return self._since_s - self._origin_s

    def table(self) -> list[str]:
        """Lines of `name  seconds`, and their sum."""
        rows = [*self._phases, ("total", self.total_s)]
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {seconds:7.2f} s" for name, seconds in rows]

    def _close(self, parts: Sequence[tuple[str, float]] = ()) -> None:
        now = self._clock()
        if self._current:
            inside = sum(seconds for _, seconds in parts)
            self._phases.append((self._current, now - self._since_s - inside))
            self._phases.extend(parts)
        elif self._phases:
            name, seconds = self._phases[-1]
            self._phases[-1] = (name, seconds + now - self._since_s)
        self._since_s = now
