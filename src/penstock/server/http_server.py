"""uvicorn on a socket that is bound before anything slow begins, with signals left to the caller.

Owns: the listening socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from penstock.base.errors import ConfigError
from penstock.config.defaults import check_public_bind
from penstock.config.settings import Settings

BACKLOG = 2048
# What remains to be written to clients when the process ends.
CLOSE_TIMEOUT_S = 2
KEEP_ALIVE_S = 75


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
    """Serves one ASGI application until `stop`."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        check_public_bind(settings)
        self._settings = settings
        self._socket: socket.socket | None = None
        self.url = ""  # known once bound
        self._server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
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

    def bind(self) -> None:
        """Takes the port. Raises ConfigError when it cannot be had."""
        host, port = self._settings.host, self._settings.port
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            bound = socket.socket(family, kind)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # inherited: the kernel drops a peer that stops reading
                timeout_ms = int(self._settings.client_timeout * 1000)
                bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            bound.bind(address)
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            raise ConfigError(
                f"Cannot listen on {host} port {port}: {error.strerror or error}.",
                remedy="Another program uses it: choose another --port, or 0 for any free one." if is_taken
                else "Check --host and --port.",
                param="port",
            ) from None  # fmt: skip
        self._socket = bound
        host, port = bound.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def serve(self) -> None:
        """Answers requests until `stop`, then closes every connection."""
        assert self._socket is not None
        await self._server.serve(sockets=[self._socket])

    async def wait_started(self) -> None:
        await self._server.listening.wait()

    def stop(self, *, at_once: bool = False) -> None:
        """Ends `serve`. at_once: without waiting for answers that are still being written."""
        self._server.should_exit = True
        self._server.force_exit = self._server.force_exit or at_once
