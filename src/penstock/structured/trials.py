"""The trials that are running, and how much they may take from those who serve.

A trial begins at a priority that is lower than a server's and still gets it a tenth of a processor that is busy:
whoever sends an ordinary grammar waits for it. One that has used up its credit, or finds none left, goes on with what
nobody else wants (SCHED_IDLE). One that has used more than an ordinary one does goes on with a small share of that
while others work: an idle processor that is put to work still slows its neighbours down, by the memory, caches and
arithmetic units that they share (measured: with half a processor idle, trials that took it all cost a model a seventh
of its pace, although its processor time stayed what it was). So what a flood of hostile grammars takes is bounded,
and a row of new ordinary ones is not held up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psutil

NICENESS: Final = 10
# An ordinary grammar takes 5 to 60 ms of processor time.
TRIAL_CREDIT_S: Final = 0.1
# All trials together: seconds of processor time a second, and how much of it is saved up: that of thirty new schemas of
# 200 keys.
REFILL: Final = 0.03
MAX_SAVED_S: Final = 0.6
# Those that used up TRIAL_CREDIT_S, while less than SPARE of the machine's processor time is left: one of them runs,
# for this share of the time, the one first that has used least.
SPARE: Final = 0.75
BUSY_SHARE: Final = 0.05
# Over how long the idleness of the machine is measured.
MEASURE_S: Final = 0.2


@dataclass(slots=True)
class _Trial:
    """used_s: processor time known so far. is_idle: it has no credit."""

    began: float
    used_s: float = 0.0
    is_idle: bool = False
    is_stopped: bool = False

    @property
    def is_heavy(self) -> bool:
        return self.used_s > TRIAL_CREDIT_S


class Trials:
    """Owned by the process that forks them. Not thread-safe."""

    def __init__(
        self,
        max_time_s: float,
        clock: Callable[[], float] = time.monotonic,
        idle_s: Callable[[], float] = lambda: float(psutil.cpu_times().idle),
    ) -> None:
        """max_time_s: a trial that is older is killed. idle_s: seconds in which processors of the machine had nothing
        to do, summed up since some time."""
        self._max_time_s = max_time_s
        self._clock = clock
        self._saved_s = MAX_SAVED_S
        self._refilled = clock()
        self._running: dict[int, _Trial] = {}
        self._idle_s = idle_s
        self._measured, self._idle_then_s, self._taken_s = clock(), idle_s(), 0.0
        self._is_busy = False
        self._share_s = 0.0  # what heavy ones may take

    def __bool__(self) -> bool:
        return bool(self._running)

    def add(self, pid: int) -> None:
        """A child that has just been forked."""
        self._running[pid] = _Trial(self._clock())
        self.look()

    def look(self) -> None:
        """Takes note of what was used since the last look, and of who has ended. To be called some fifty times a
        second while there are any."""
        now = self._clock()
        elapsed_s = now - self._refilled
        self._saved_s = min(MAX_SAVED_S, self._saved_s + elapsed_s * REFILL)
        self._share_s = min(0.0, self._share_s + elapsed_s * BUSY_SHARE)
        self._refilled = now
        for pid, trial in list(self._running.items()):
            self._charge(trial, _used_s(pid))
        self._reap()
        for pid, trial in self._running.items():
            if not trial.is_idle and (self._saved_s <= 0 or trial.is_heavy):
                trial.is_idle = True
                _make_idle(pid)
        self._measure(now)
        self._stop_and_go(now)

    def _charge(self, trial: _Trial, used_s: float) -> None:
        if used_s > trial.used_s:
            if not trial.is_idle:
                self._saved_s -= used_s - trial.used_s
            elif trial.is_heavy:
                self._share_s -= used_s - trial.used_s
            self._taken_s += used_s - trial.used_s
            trial.used_s = used_s

    def _reap(self) -> None:
        for pid in list(self._running):
            ended, _, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                self._charge(self._running.pop(pid), usage.ru_utime + usage.ru_stime)

    def _measure(self, now: float) -> None:
        """Whether others work; what trials take is spare too."""
        if now - self._measured < MEASURE_S:
            return
        idle_s, elapsed_s = self._idle_s(), now - self._measured
        if not self._is_busy:
            self._share_s = 0.0  # what was taken then cost nobody anything
        spare_s = idle_s - self._idle_then_s + self._taken_s
        self._is_busy = spare_s < SPARE * elapsed_s * (os.cpu_count() or 1)
        self._measured, self._idle_then_s, self._taken_s = now, idle_s, 0.0

    def _stop_and_go(self, now: float) -> None:
        heavy = [(trial.used_s, pid) for pid, trial in self._running.items() if trial.is_heavy]
        chosen = min(heavy, default=(0.0, 0))[1]
        for _, pid in heavy:
            trial = self._running[pid]
            if now - trial.began > self._max_time_s:
                _send(pid, signal.SIGKILL)  # its own alarm does not reach it while it is stopped
                continue
            stops = self._is_busy and (pid != chosen or self._share_s < 0)
            if stops != trial.is_stopped:
                trial.is_stopped = stops
                _send(pid, signal.SIGSTOP if stops else signal.SIGCONT)


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


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
