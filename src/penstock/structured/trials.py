"""The trials that are running, and how much they may take from those who serve.

A trial begins at a low priority, which still gets it a share of a machine that is busy: whoever sends an ordinary
grammar waits for it. One that has used up its credit, or finds none left, goes on with what nobody else wants
(SCHED_IDLE). So a flood of hostile grammars takes no more than the credit's refill, whatever its senders try.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

NICENESS: Final = 15
# An ordinary grammar takes 5 to 60 ms of processor time.
TRIAL_CREDIT_S: Final = 0.1
# All trials together: seconds of processor time a second, and how much of it is saved up.
REFILL: Final = 0.03
MAX_SAVED_S: Final = 0.3


@dataclass(slots=True)
class _Trial:
    """used_s: processor time known so far. is_idle: it has no credit."""

    used_s: float = 0.0
    is_idle: bool = False


class Trials:
    """Owned by the process that forks them. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._saved_s = MAX_SAVED_S
        self._refilled = clock()
        self._running: dict[int, _Trial] = {}

    def __bool__(self) -> bool:
        return bool(self._running)

    def add(self, pid: int) -> None:
        """A child that has just been forked."""
        self._running[pid] = _Trial()
        self.look()

    def look(self) -> None:
        """Takes note of what was used since the last look, and of who has ended. To be called some fifty times a
        second while there are any."""
        now = self._clock()
        self._saved_s = min(MAX_SAVED_S, self._saved_s + (now - self._refilled) * REFILL)
        self._refilled = now
        for pid, trial in list(self._running.items()):
            self._charge(trial, _used_s(pid))
        self._reap()
        for pid, trial in self._running.items():
            if not trial.is_idle and (self._saved_s <= 0 or trial.used_s > TRIAL_CREDIT_S):
                trial.is_idle = True
                _make_idle(pid)

    def _charge(self, trial: _Trial, used_s: float) -> None:
        if used_s > trial.used_s:
            if not trial.is_idle:
                self._saved_s -= used_s - trial.used_s
            trial.used_s = used_s

    def _reap(self) -> None:
        for pid in list(self._running):
            ended, _, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                self._charge(self._running.pop(pid), usage.ru_utime + usage.ru_stime)


def _used_s(pid: int) -> float:
    """Processor time of a child; 0 where it cannot be told."""
    if sys.platform != "linux":
        return 0.0
    with contextlib.suppress(OSError):
        return time.clock_gettime(~pid << 3 | 2)  # its CPUCLOCK_SCHED, as clock_getcpuclockid(3) makes it
    return 0.0


def _make_idle(pid: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
