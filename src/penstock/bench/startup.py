"""How long `penstock serve` takes until it is ready: warm, and with the weights out of the page cache.

Ready means: /health/ready answers 200, asked every 10 ms from the moment the process is started. Beside it the time
that plain reads of the weights take, which is what a loader that copies nothing twice needs at least.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

PENSTOCK: Final = Path(sys.executable).with_name("penstock")
TIMEOUT_S: Final = 300.0


def help_seconds() -> float:
    """`penstock --help`, from the start of the process to its end."""
    start = time.perf_counter()
    subprocess.run([str(PENSTOCK), "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


class ServerProcess:
    """A `penstock serve` on a free port of this machine; ended with its block. log: what it printed, once it ended."""

    def __init__(self, arguments: Sequence[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.log = ""
        self._command = [str(PENSTOCK), "serve", *arguments, "--host", "127.0.0.1", "--port", str(self._port)]

    def __enter__(self) -> Self:
        self._output = tempfile.TemporaryFile()  # a pipe that nobody reads would stop the server
        self._process = subprocess.Popen(
            self._command, stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True
        )
        return self

    def wait_until_ready(self) -> None:
        """Raises RuntimeError when the server ends or takes too long."""
        start = time.perf_counter()
        while not _is_ready(self._port):
            if self._process.poll() is not None or time.perf_counter() - start > TIMEOUT_S:
                self._end()
                raise RuntimeError(f"{' '.join(self._command)} was not ready:\n{self.log[-3000:]}")
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=30)
        self._end()

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if not self._output.closed:
            self._output.seek(0)
            self.log = self._output.read().decode(errors="replace")
            self._output.close()


def ready_seconds(arguments: Sequence[str]) -> tuple[float, str]:
    """(seconds to the first 200 of /health/ready, what the server printed of its phases).

    Raises RuntimeError when the server ends or takes too long.
    """
    start = time.perf_counter()
    with ServerProcess(arguments) as server:
        server.wait_until_ready()
        seconds = time.perf_counter() - start
    return seconds, server.log


def _is_ready(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def weight_files(model: Path) -> list[Path]:
    return sorted([*model.glob("*.safetensors"), *model.glob("*.gguf")]) if model.is_dir() else [model]


def read_seconds(model: Path) -> float:
    """Reading the weights into fresh memory."""
    start = time.perf_counter()
    for path in weight_files(model):
        with path.open("rb", buffering=0) as file:
            view = memoryview(bytearray(path.stat().st_size))
            place = 0
            while place < len(view):
                place += file.readinto(view[place : place + (64 << 20)]) or 0
    return time.perf_counter() - start


def drop_from_page_cache(model: Path) -> None:
    """Asks the system to forget the weights' pages, so that the next start reads the disk (Linux)."""
    for path in weight_files(model):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(model: Path | None, rounds: int, with_cold: bool = False) -> dict[str, Any]:
    """Seconds of each round, by what was started; the phases that the last checkpoint start printed."""
    times: dict[str, list[float]] = {"help": [], "bundled": []}
    phases = ""
    help_seconds()
    for _ in range(rounds):
        times["help"].append(help_seconds())
        times["bundled"].append(ready_seconds([])[0])
    if model is not None:
        arguments = [str(model), "--max-model-len", "2048"]
        times |= {"read": [], "checkpoint": []} | ({"checkpoint cold": []} if with_cold else {})
        read_seconds(model)
        for _ in range(rounds):
            times["read"].append(read_seconds(model))
            seconds, phases = ready_seconds(arguments)
            times["checkpoint"].append(seconds)
            if with_cold:
                drop_from_page_cache(model)
                times["checkpoint cold"].append(ready_seconds(arguments)[0])
    return {"model": model.name if model else "", "rounds": rounds, "seconds": times, "phases": phases}
