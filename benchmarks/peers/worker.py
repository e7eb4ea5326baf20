"""The parent's half of the offline comparison: one engine's worker process, spoken to in JSON lines."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

from engines import Engine
from process_tree import PeakMemory, ProcessTree


class WorkerError(RuntimeError):
    """The worker answered with an error, ended, or did not answer in time."""


class Worker:
    """A started worker. Paused from the end of one request to the start of the next."""

    def __init__(self, engine: Engine, log: Path) -> None:
        self.engine = engine
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [str(engine.python), str(engine.worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=engine.environment(),
                start_new_session=True,
            )
        self.tree = ProcessTree(self.process.pid)
        self.memory = PeakMemory(self.tree)

    def ask(self, request: dict[str, Any], timeout_s: float = 1800.0) -> dict[str, Any]:
        """Lets the worker run, sends `request`, returns its answer and pauses it again.

        Raises WorkerError; after a time-out the worker has been ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.tree.resume()
        watchdog = threading.Timer(timeout_s, self.tree.end, kwargs={"patience_s": 1.0})
        watchdog.start()
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            watchdog.cancel()
        if not line:
            raise WorkerError(f"{self.engine.name} ended or took over {timeout_s:.0f} s; its log: {self.log}")
        self.tree.pause()
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise WorkerError(f"{self.engine.name}: {answer['error']} (log: {self.log})")
        return answer

    def load(self, options: dict[str, Any]) -> dict[str, Any]:
        with self.memory.watch():
            return self.ask({"op": "load", **options})

    def generate(self, batch: int, prompt_len: int, output_len: int, seed: int) -> float:
        """Seconds of one static batch; WorkerError when the engine made another number of tokens than was asked."""
        shape = {"batch": batch, "prompt_len": prompt_len, "output_len": output_len}
        answer = self.ask({"op": "generate", **shape, "seed": seed})
        if answer["tokens"] != batch * output_len:
            raise WorkerError(f"{self.engine.name} made {answer['tokens']} tokens instead of {batch * output_len}")
        seconds: float = answer["seconds"]
        return seconds

    def end(self) -> None:
        """Asks it to stop, and ends whatever of it is still there."""
        self.tree.resume()
        if self.process.poll() is None and self.process.stdin is not None:
            try:
                self.process.stdin.write(b'{"op": "stop"}\n')
                self.process.stdin.close()
                self.process.wait(timeout=15)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                pass
        self.tree.end()
