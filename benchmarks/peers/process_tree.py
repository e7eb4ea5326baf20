"""One engine's processes as a unit: stop them, let them go on, end them, and read the memory that they really hold."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Memory:
    """Proportional set size of all processes of a tree, in bytes: a page shared by n processes counts 1/n in each.

    total includes mapped files (libraries, a checkpoint read by mapping); private is what only the engine holds:
    anonymous memory and shared memory.
    """

    total: int
    private: int


class ProcessTree:
    """A process and its descendants. The descendants are looked up at each call: engines start and end theirs."""

    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)

    def processes(self) -> list[psutil.Process]:
        """The living processes, the root first; empty when the root is gone."""
        try:
            return [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def pause(self) -> None:
        """Stops every process: threads that spin for work would otherwise take cores from the engine on the clock."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def memory(self) -> Memory:
        """Reads smaps_rollup of each process; costs milliseconds a gigabyte, so never while a case is on the clock."""
        total = private = 0
        for process in self.processes():
            with contextlib.suppress(OSError):
                fields = _rollup(process.pid)
                total += fields.get("Pss", 0)
                private += fields.get("Pss_Anon", 0) + fields.get("Pss_Shmem", 0)
        return Memory(total, private)

    def cpu_seconds(self) -> float:
        """User and system time of the living processes so far."""
        seconds = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds += times.user + times.system
        return seconds

    def end(self, patience_s: float = 20.0) -> None:
        """SIGTERM, then SIGKILL after `patience_s`, for every process of the tree."""
        processes = self.processes()
        self.resume()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(processes, timeout=patience_s)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=patience_s)


def _rollup(pid: int) -> dict[str, int]:
    fields: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        fields[name.rstrip(":")] = int(value) * 1024
    return fields


class PeakMemory:
    """The highest memory of a tree that samples saw. Sampling runs only inside `watch()`."""

    def __init__(self, tree: ProcessTree, interval_s: float = 0.15) -> None:
        self.tree = tree
        self.interval_s = interval_s
        self.peak = Memory(0, 0)

    def sample(self) -> None:
        now = self.tree.memory()
        self.peak = Memory(max(self.peak.total, now.total), max(self.peak.private, now.private))

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Samples on a thread until the block ends. For loading and for the warm-up round, which nobody times."""
        done = threading.Event()

        def loop() -> None:
            while not done.is_set():
                self.sample()
                done.wait(self.interval_s)

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def wait_for_quiet(limit: float, patience_s: float) -> float:
    """Waits until other work leaves the cores alone (their busy share below `limit`), at most `patience_s`.

    Returns the last busy share seen, for the report: a figure measured on a busy machine says so.
    """
    end = time.monotonic() + patience_s
    while True:
        busy: float = psutil.cpu_percent(interval=1.0) / 100.0
        if busy <= limit or time.monotonic() >= end:
            return busy


def end_on_sigterm() -> None:
    """Makes SIGTERM an ordinary exit, so that `finally` ends the engines: paused ones would stay for good."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
