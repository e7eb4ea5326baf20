#!/usr/bin/env python3
"""How long Penstock takes to start: `--help`, the bundled model, a checkpoint beside the time that reading it takes.

    startup.py [--model DIR] [--rounds 5]

Ready means: /health/ready answers 200, asked every 10 ms from the moment the process is started. The checkpoint is read
once beforehand, so that it is in the page cache for both. "read" fills fresh memory with the files' bytes by plain
reads, one thread, which is what a loader that copies nothing twice would need at least.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PENSTOCK = Path(sys.executable).with_name("penstock")
RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).resolve().parent / "results"))
TIMEOUT_S = 120.0


def help_seconds() -> float:
    start = time.perf_counter()
    subprocess.run([str(PENSTOCK), "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def ready_seconds(arguments: list[str]) -> float:
    """From starting `penstock serve` to the first 200 of /health/ready. RuntimeError when it ends or takes too long."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.perf_counter()
    command = [str(PENSTOCK), "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not _is_ready(port):
            if process.poll() is not None or time.perf_counter() - start > TIMEOUT_S:
                process.kill()
                output = process.communicate()[0].decode(errors="replace")
                raise RuntimeError(f"{' '.join(command)} was not ready:\n{output[-3000:]}")
            time.sleep(0.01)
        return time.perf_counter() - start
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _is_ready(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def read_seconds(model: Path) -> float:
    """Reading the weights into fresh memory."""
    start = time.perf_counter()
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(path.stat().st_size)
            view = memoryview(buffer)
            place = 0
            while place < len(view):
                place += file.readinto(view[place : place + (64 << 20)])
    return time.perf_counter() - start


def measure(model: Path | None, rounds: int) -> dict[str, Any]:
    """Seconds of each round, by what was started."""
    times: dict[str, list[float]] = {"help": [], "bundled": []}
    help_seconds()
    for _ in range(rounds):
        times["help"].append(help_seconds())
        times["bundled"].append(ready_seconds([]))
    if model is not None:
        times |= {"read": [], "checkpoint": []}
        read_seconds(model)
        for _ in range(rounds):
            times["read"].append(read_seconds(model))
            times["checkpoint"].append(ready_seconds([str(model), "--max-model-len", "2048"]))
    return {"model": model.name if model else "", "rounds": rounds, "seconds": times}


def show(result: dict[str, Any]) -> str:
    """A markdown table with the issue's bounds."""
    middle = {name: statistics.median(values) for name, values in result["seconds"].items()}
    rows = [
        ("`penstock --help`", middle["help"], 0.3, "0.3 s"),
        ("bundled model ready", middle["bundled"], 3.0, "3 s"),
    ]
    if "checkpoint" in middle:
        bound = 1.5 * middle["read"] + 2.0
        rows.append(
            (f"{result['model']} ready", middle["checkpoint"], bound, f"1.5 x {middle['read']:.2f} s (read) + 2 s")
        )
    lines = ["| what | median s | bound s | bound | holds |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {what} | {seconds:.2f} | {bound:.2f} | {text} | {'yes' if seconds <= bound else 'no'} |"
        for what, seconds, bound, text in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint directory; without it only the bundled model")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    result = measure(options.model, options.rounds)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "startup.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "startup.md").write_text(show(result))
    print(show(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
