"""uvicorn on a socket that is already bound, with signals left to the caller.

Owns: the listening socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from penstock.server.http_protocol import BoundedHttpProtocol
from penstock.server.listen import url_of

BACKLOG: Final = 2048
# What remains to be written to clients when the process ends.
CLOSE_TIMEOUT_S: Final = 2
KEEP_ALIVE_S: Final = 75


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers (draining is decided above), and with a word when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves one ASGI application on `bound` until `stop`."""

    def __init__(self, app: ASGIApp, bound: socket.socket, client_timeout_s: float = 60.0) -> None:
        self._socket = bound
        self.url = url_of(bound)
        self._server = _Server(
            uvicorn.Config(
                app,
                http=BoundedHttpProtocol.with_timeout(client_timeout_s),
                loop="none",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            )
        )

    async def serve(self) -> None:
        """Answers requests until `stop`, then closes every connection."""
        await self._server.serve(sockets=[self._socket])

    async def wait_started(self) -> None:
        await self._server.listening.wait()

    def stop(self, *, at_once: bool = False) -> None:
        """Ends `serve`. at_once: without waiting for answers that are still being written."""
        self._server.should_exit = True
        self._server.force_exit = self._server.force_exit or at_once
