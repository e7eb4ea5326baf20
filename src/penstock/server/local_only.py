"""What a server without keys trusts: programs on this machine, but not the web pages that their browsers show.

A page can make a browser send requests to 127.0.0.1, under a name that resolves there (DNS rebinding) or as a plain
form post. Such requests carry the page's name in Host or Origin; local programs carry an address or localhost.
"""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

_BODY: Final = (
    b'{"error":{"message":"Without an API key only this machine is served: this request names another host or a web '
    b'page in Host or Origin. Set PENSTOCK_API_KEY.","type":"permission_error","param":null,"code":"foreign_host"}}'
)


class LocalOnlyMiddleware:
    """Answers 403 to a request whose Host or Origin is a name other than localhost. Pure ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not all(_is_local(name, value) for name, value in scope["headers"]):
            await send({"type": "http.response.start", "status": 403, "headers": [
                (b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BODY)),
                (b"connection", b"close"),
            ]})  # fmt: skip
            await send({"type": "http.response.body", "body": _BODY})
            return
        await self._app(scope, receive, send)


def _is_local(name: bytes, value: bytes) -> bool:
    if name == b"host":
        return value in _USUAL or _is_local_name(value.decode("latin-1"))
    if name == b"origin":
        return _is_local_name(urlsplit(value.decode("latin-1")).netloc)
    return True


# Known without parsing, since every request passes here.
_USUAL: Final = frozenset({b"localhost", b"127.0.0.1", b"localhost:8000", b"127.0.0.1:8000", b""})


def _is_local_name(authority: str) -> bool:
    """Whether `host[:port]` is localhost or an address: rebinding needs a name that an attacker controls."""
    try:
        host = urlsplit(f"//{authority}").hostname or ""
        return host == "localhost" or bool(ipaddress.ip_address(host))
    except ValueError:
        return False
