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
import time
from pathlib import Path
from typing import Any, Final

PENSTOCK: Final = Path(sys.executable).with_name("penstock")
TIMEOUT_S: Final = 300.0


def help_seconds() -> float:
    """`penstock --help`, from the start of the process to its end."""
    start = time.perf_counter()
    subprocess.run([str(PENSTOCK), "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def ready_seconds(arguments: list[str]) -> tuple[float, str]:
    """(seconds to the first 200 of /health/ready, what the server printed of its phases).

    Raises RuntimeError when the server ends or takes too long.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.perf_counter()
    command = [str(PENSTOCK), "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    output = b""
    try:
        while not _is_ready(port):
            if process.poll() is not None or time.perf_counter() - start > TIMEOUT_S:
                process.kill()
                text = process.communicate()[0].decode(errors="replace")
                raise RuntimeError(f"{' '.join(command)} was not ready:\n{text[-3000:]}")
            time.sleep(0.01)
        seconds = time.perf_counter() - start
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            output = process.communicate(timeout=30)[0] or b""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return seconds, output.decode(errors="replace")


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
