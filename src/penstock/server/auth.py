"""Who may ask. Closed by default: a route is public only when it is on the list.

The decision is taken on the path that the router will dispatch, computed by the router's own function, so no
spelling of a path can reach a handler by another name than the one that was judged.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Final

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Receive, Scope, Send

PUBLIC_PATHS: Final = frozenset({"/health", "/health/live", "/health/ready"})
_BODY: Final = (
    b'{"error":{"message":"A valid API key is required: Authorization: Bearer KEY.",'
    b'"type":"authentication_error","param":null,"code":"invalid_api_key"}}'
)


class ApiKeyMiddleware:
    """Answers 401 to everything but PUBLIC_PATHS unless a configured key comes with it. Pure ASGI: it hides nothing."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        assert api_keys, "without keys there is nothing to check; leave the middleware out"
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await send({"type": "http.response.start", "status": 401, "headers": [
            (b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BODY)),
            (b"www-authenticate", b"Bearer"), (b"connection", b"close"),
        ]})  # fmt: skip
        await send({"type": "http.response.body", "body": _BODY})

    def _is_allowed(self, scope: Scope) -> bool:
        if scope["type"] == "http" and get_route_path(scope) in PUBLIC_PATHS:
            return True
        given = _bearer_token(scope)
        # Every key is compared, so that the time taken says nothing about which one came close.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return any(matches)


def _bearer_token(scope: Scope) -> bytes:
    """The token of the only Authorization header, or Anthropic's x-api-key; several headers are none."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    keys = [value for name, value in scope["headers"] if name == b"x-api-key"]
    if not values and len(keys) == 1:
        return bytes(keys[0].strip())
    if len(values) != 1:
        return b""
    scheme, _, token = values[0].partition(b" ")
    return bytes(token.strip()) if scheme.lower() == b"bearer" else b""
