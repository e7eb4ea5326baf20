"""Log lines that never make a request wait: a bounded queue in front of one writing thread; drops are counted.

Owns: the queue and the thread.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from typing import Final, TextIO

import msgspec

MAX_QUEUED_LINES: Final = 10_000
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
        self._queue: queue.Queue[logging.LogRecord | None] = queue.Queue(capacity)
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
        """Queues the record. The base class would take a lock that the queue already has."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1
            return False
        return True

    def close(self) -> None:
        """Writes what is queued, waiting at most two seconds for a stream that hangs."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=1.0)
            except queue.Full:
                return
            self._thread.join(timeout=1.0)
        super().close()

    def _run(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                self._stream.write(self._format_line(record))
                if self._queue.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # a closed pipe: later lines are lost, requests are not
                self.num_dropped += 1

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
