"""A server for this process alone: how `chat` and `run` use a model without --url.

They take the same road as any client, so what works here works against a server, and the other way round.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import sys
import threading
from collections.abc import Callable, Iterator

from penstock.base.errors import EngineDeadError
from penstock.cli.api_client import ApiClient
from penstock.cli.serve import ServerStart, run_loop
from penstock.config.settings import ResolvedSettings
from penstock.observability.logs import LogSink


@contextlib.contextmanager
def private_server(resolved: ResolvedSettings) -> Iterator[tuple[ApiClient, str]]:
    """Loads the model on a thread with its own event loop; yields a client and the model's name.

    Listens on a free loopback port behind a key that nobody else knows. Raises what the start raised.
    """
    key = secrets.token_urlsafe(24)
    values = dataclasses.replace(resolved.values, host="127.0.0.1", port=0, api_key=(key,), drain_timeout=0.0)
    if values.log_level == "info":  # a line for each request is for servers
        values = dataclasses.replace(values, log_level="warning")
    sink = LogSink(values.log_format)
    sink.install(values.log_level)
    start = ServerStart(ResolvedSettings(values, resolved.sources), sink)
    thread = _ServerThread(start)
    try:
        thread.wait_ready()
        if values.log_level == "debug":
            print("\n".join(start.report()), file=sys.stderr)
        yield ApiClient(start.url, key), start.model_name
    finally:
        thread.stop()
        sink.close()


class _ServerThread:
    """Runs a ServerStart on a thread until `stop`."""

    def __init__(self, start: ServerStart) -> None:
        self._start = start
        self._changed = threading.Event()
        self._is_ready = False
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="penstock-server", daemon=True)
        self._thread.start()

    def wait_ready(self) -> None:
        while not self._changed.wait(0.2):  # short waits: Ctrl-C is noticed between them
            pass
        if not self._is_ready:
            raise self._error or EngineDeadError("The server ended before it was ready.")

    def stop(self) -> None:
        """Ends the server and waits for its processes to be gone."""
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            for _ in range(2):  # the second does not wait for requests
                with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
                    self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(timeout=20.0)

    def _run(self) -> None:
        try:
            run_loop(self._start.run(self._note_ready, self._note_stoppable))
        except BaseException as error:
            self._error = error
        finally:
            self._changed.set()

    def _note_ready(self) -> None:
        self._is_ready = True
        self._changed.set()

    def _note_stoppable(self, stop: Callable[[], None]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), stop
