"""A server's life: listen, load, serve, drain, stop. It listens first, so that health can be asked while it loads.

Owns: the order of these steps, and the engine's replacement when it dies.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from penstock.base.errors import EngineDeadError
from penstock.server.http_server import HttpServer
from penstock.server.state import Engine, ServerState
from penstock.server.text import TextLayer

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
RESTART_WINDOW_S = 600.0
# For the errors that tell open requests about the end.
LAST_ANSWERS_S = 2.0
HTTP_END_S = 10.0

StartEngine = Callable[[], Awaitable[Engine]]
LoadText = Callable[[Engine], Awaitable[TextLayer]]


class Lifecycle:
    """Runs one server until `stop` is called, or its engine cannot be kept alive.

    start_engine: starts an engine and returns when it is ready. load_text: the text layer for it.
    on_ready: called once, when the first request can be served.
    """

    def __init__(
        self, state: ServerState, http: HttpServer, *, start_engine: StartEngine, load_text: LoadText,
        on_ready: Callable[[], None],
    ) -> None:  # fmt: skip
        self._state = state
        self._http = http
        self._start_engine = start_engine
        self._load_text = load_text
        self._on_ready = on_ready
        self._stop_asked = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._deaths_s: list[float] = []

    def stop(self) -> None:
        """The first call drains, the second ends at once. Safe to call from a signal handler of the loop."""
        if self._stop_asked.is_set():
            self._stop_now.set()
        self._stop_asked.set()
        self._state.drain()  # at once: readiness flips before anything else happens

    async def run(self) -> None:
        """Serves until stopped. Raises what start_engine raised, or EngineDeadError when restarts did not help."""
        serving = asyncio.create_task(self._http.serve())
        sweeping = asyncio.create_task(self._state.sweep_forever())
        living = asyncio.create_task(self._live())
        stopping = asyncio.create_task(self._stop_asked.wait())
        try:
            await asyncio.wait((living, stopping), return_when=asyncio.FIRST_COMPLETED)
            if living.done():
                living.result()
            await self._drain()
        finally:
            for task in (living, stopping, sweeping):
                task.cancel()
            await asyncio.wait((living, stopping, sweeping))
            await self._end(serving)

    async def _live(self) -> None:
        """Starts the engine, and again when it dies, until that has happened too often."""
        is_first = True
        while True:
            engine = await self._start_engine()
            self._state.serve(engine, await self._load_text(engine))
            if is_first:
                self._on_ready()
            is_first = False
            await self._state.engine_died.wait()
            self._note_death()
            self._state.lose_engine()
            logger.error("the engine process ended; starting it again")

    def _note_death(self) -> None:
        now_s = time.monotonic()
        self._deaths_s = [death_s for death_s in self._deaths_s if now_s - death_s < RESTART_WINDOW_S] + [now_s]
        if len(self._deaths_s) > MAX_RESTARTS:
            raise EngineDeadError(
                f"The engine process ended {len(self._deaths_s)} times within {RESTART_WINDOW_S / 60:.0f} minutes.",
                remedy="Its last lines on standard error say why; `penstock doctor` checks the machine.",
            )

    async def _drain(self) -> None:
        """Lets open requests finish, for as long as settings and a second signal allow."""
        num_open, timeout_s = self._state.num_open, self._state.settings.drain_timeout
        if num_open:
            logger.info("draining: %d requests have %g s to finish", num_open, timeout_s)
        emptied = asyncio.create_task(self._state.wait_until_empty(timeout_s))
        hurried = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait((emptied, hurried), return_when=asyncio.FIRST_COMPLETED)
        for task in (emptied, hurried):
            task.cancel()

    async def _end(self, serving: asyncio.Task[None]) -> None:
        """Ends the engine, tells open requests, closes the connections."""
        if self._state.num_open:
            logger.warning("stopping: %d requests are cut off", self._state.num_open)
        if self._state.engine is not None:
            await self._state.engine.shutdown(0.0)
        await self._state.wait_until_empty(LAST_ANSWERS_S)
        self._http.stop(at_once=True)
        try:
            await asyncio.wait_for(serving, HTTP_END_S)
        except Exception:  # the rest has ended well; this must not hide why the server stopped
            logger.exception("the HTTP server did not end cleanly")
        self._state.close()
