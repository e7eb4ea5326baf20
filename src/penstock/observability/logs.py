"""Log lines that never make a request wait: a bounded queue in front of one writing thread; drops are counted.

The thread looks at the queue some times a second instead of being woken for each line: a wake-up takes the
interpreter away from the event loop, which costs a request more than its line does.
Owns: the queue and the thread.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from typing import Final, TextIO

import msgspec

MAX_QUEUED_LINES: Final = 10_000
POLL_S: Final = 0.05
CLOSE_S: Final = 2.0
_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class LogSink(logging.Handler):
    """Writes records to `stream` from its own thread. `num_dropped` counts the lines that found the queue full.

    A hung terminal or pipe therefore costs log lines, never a request.
    """

    def __init__(
        self, log_format: str = "text", stream: TextIO | None = None, capacity: int = MAX_QUEUED_LINES
    ) -> None:
        super().__init__()
        self.num_dropped = 0
        self._stream = stream if stream is not None else sys.stderr
        self._is_json = log_format == "json"
        self._capacity = capacity
        self._queue: deque[logging.LogRecord] = deque()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="penstock-log", daemon=True)
        self._thread.start()

    def install(self, level: str) -> None:
        """Makes this sink the only handler of the root logger."""
        root = logging.getLogger()
        root.handlers[:] = [self]
        root.setLevel(_LEVELS[level])
        # uvicorn's own lines would only repeat ours.
        logging.getLogger("uvicorn").setLevel(logging.WARNING)

    def handle(self, record: logging.LogRecord) -> bool:
        """Queues the record. The base class would take a lock; appending to a deque needs none."""
        if len(self._queue) >= self._capacity:
            self.num_dropped += 1
            return False
        self._queue.append(record)
        return True

    def close(self) -> None:
        """Writes what is queued, waiting at most two seconds for a stream that hangs."""
        self._closing.set()
        self._thread.join(timeout=CLOSE_S)
        super().close()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closing.wait(POLL_S)
            self._write_queued()

    def _write_queued(self) -> None:
        lines: list[str] = []
        while self._queue:
            lines.append(self._format_line(self._queue.popleft()))
        if not lines:
            return
        try:
            self._stream.write("".join(lines))
            self._stream.flush()
        except (OSError, ValueError):  # a closed pipe: later lines are lost, requests are not
            self.num_dropped += len(lines)

    def _format_line(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created)) + f".{int(record.msecs):03d}"
        fields = getattr(record, "fields", None)
        if self._is_json:
            entry = {
                "time": when,
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": record.getMessage(),
            }
            if fields is not None:
                entry |= msgspec.to_builtins(fields)
            if record.exc_info:
                entry["exception"] = logging.Formatter().formatException(record.exc_info)
            return msgspec.json.encode(entry).decode() + "\n"
        text = record.getMessage()
        if fields is not None:
            pairs = msgspec.to_builtins(fields).items()
            text += " " + " ".join(f"{key}={_show(value)}" for key, value in pairs)
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        return f"{when} {record.levelname.lower():<7} {text}\n"


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".")
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    # One line a record, whatever a client put into a field.
    return text if text.isprintable() and " " not in text and text else msgspec.json.encode(text).decode()
