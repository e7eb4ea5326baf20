"""Requests that generate nothing: JSON in, JSON out, with the same bounds and errors as those that do.

Owns: nothing; a request's state lives in its call.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from starlette.types import Receive, Scope, Send

from penstock.base.errors import DrainingError, PenstockError
from penstock.messages import ErrorInfo
from penstock.server.exchange import ClientGoneError, Exchange, choose_request_id
from penstock.server.state import ServerState

logger = logging.getLogger(__name__)
_encode: Final = msgspec.json.Encoder().encode

# Gives what the answer's JSON is made from; bytes are sent as they are.
Handler = Callable[[bytes, Exchange], Awaitable[object]]
ErrorBody = Callable[[ErrorInfo], bytes]


class CallEndpoint:
    """An ASGI application around one handler. What it raises becomes the protocol's own error."""

    def __init__(self, state: ServerState, handler: Handler, error_body: ErrorBody) -> None:
        self._state = state
        self._handler = handler
        self._error_body = error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._state
        exchange = Exchange(scope, receive, send, "")
        exchange.request_id = choose_request_id(exchange.headers.get(b"x-request-id"), state.new_id())
        opened = state.open_request(exchange)
        try:
            body = await exchange.read_body()
            answer = await self._handler(body, exchange)
            await exchange.respond(200, answer if isinstance(answer, bytes) else _encode(answer))
        except asyncio.CancelledError:
            await self._fail(exchange, opened.cut or DrainingError("The server shut down before it answered."))
            if opened.cut is None:
                raise
        except ClientGoneError:
            pass
        except Exception as error:
            if not isinstance(error, PenstockError):
                logger.exception("request %s failed inside the server", exchange.request_id)
            await self._fail(exchange, error)
        finally:
            exchange.close()
            state.close_request(opened)

    async def _fail(self, exchange: Exchange, error: Exception) -> None:
        info = ErrorInfo.of(error)
        if not exchange.is_started:
            headers = [(b"connection", b"close")] if info.status in (408, 413) else []
            await exchange.respond(info.status, self._error_body(info), headers=headers)
