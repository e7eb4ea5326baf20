"""A request that comes from inside the server (a background response, a line of a batch), through the same endpoint as
one from outside: the same validation, limits and accounting.

Owns: the tasks of inner calls in progress.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message

# Keys of the ASGI scope that only an inner call can set; a client has no say in them.
PRIORITY_KEY = "penstock.priority"
RESPONSE_ID_KEY = "penstock.response_id"


@dataclass(eq=False)
class InnerCall:
    """One POST of a JSON body to an endpoint. After `run`: status and body of the answer."""

    endpoint: ASGIApp
    path: str
    request_body: bytes
    extensions: dict[str, Any] = field(default_factory=dict)
    status: int = 0
    body: bytes = b""

    def __post_init__(self) -> None:
        self._is_sent = False
        self._left = asyncio.Event()

    def leave(self) -> None:
        """Ends the request as a client that goes away does."""
        self._left.set()

    async def run(self) -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": self.path,
            "root_path": "",
            "headers": [(b"content-length", b"%d" % len(self.request_body))],
            **self.extensions,
        }
        await self.endpoint(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self.request_body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message.get("body", b"")
