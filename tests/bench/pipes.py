"""Connections in memory, for the simulated loop: seconds cost nothing and are exact."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class PipeTransport(asyncio.Transport):
    """One end of a connection in memory. Bytes arrive in the loop's next turn, in no simulated time."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.peer: PipeTransport
        self._loop = asyncio.get_running_loop()
        self._is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._is_closed:
            self._loop.call_soon(self.peer.receive, bytes(data))

    def receive(self, data: bytes) -> None:
        if not self._is_closed:
            self.protocol.data_received(data)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._loop.call_soon(self.protocol.connection_lost, None)
            self._loop.call_soon(self.peer.lose)

    def abort(self) -> None:
        self.close()

    def lose(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.protocol.connection_lost(None)

    def is_closing(self) -> bool:
        return self._is_closed


def connector_to(
    make_server: Callable[[], asyncio.Protocol], accept_s: Callable[[], float] = lambda: 0.0
) -> Callable[[Callable[[], asyncio.Protocol]], Coroutine[Any, Any, object]]:
    """Connects to a server in memory. accept_s: how long the server takes to accept the next connection."""

    async def connect(make_client: Callable[[], asyncio.Protocol]) -> object:
        if wait_s := accept_s():
            await asyncio.sleep(wait_s)
        client, server = PipeTransport(make_client()), PipeTransport(make_server())
        client.peer, server.peer = server, client
        server.protocol.connection_made(server)
        client.protocol.connection_made(client)
        return client

    return connect
