"""Stored responses: retrieve, list input, delete, cancel; and those that are made in the background.

Owns: the store, and the tasks of background responses.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.types import ASGIApp

from penstock.base.errors import ValidationError
from penstock.server.exchange import Exchange
from penstock.server.inner_call import RESPONSE_ID_KEY, InnerCall
from penstock.server.openai.response_store import ResponseStore, StoredResponse
from penstock.server.state import ServerState

PATH = "/v1/responses"


class Responses:
    """The stored responses of one server. `endpoint` is set when the routes are built."""

    endpoint: ASGIApp

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._store: ResponseStore | None = None
        self._running: dict[str, tuple[InnerCall, asyncio.Task[None]]] = {}
        state.when_closing.append(self.close)

    def close(self) -> None:
        """Ends the work on the store; the next use opens it again."""
        if self._store is not None:
            self._store.close()
            self._store = None

    @property
    def store(self) -> ResponseStore:
        """Opened when it is first needed: a server that never answers a response leaves no file."""
        if self._store is None:
            path = self._state.settings.data_path / "responses.sqlite3"
            self._store = ResponseStore(path, self._state.now_s())
        return self._store

    def put(self, response: StoredResponse) -> None:
        self.store.put(response, self._state.now_s())

    def finished(self, response_id: str) -> StoredResponse:
        """A response that can be continued. Raises UnknownResponseError, ValidationError."""
        found = self.store.get(response_id, self._state.now_s())
        if not found.is_done or found.messages == b"[]":
            raise ValidationError(
                f"{response_id[:100]} is not complete: it cannot be continued.", param="previous_response_id"
            )
        return found

    # Background

    def begin(self, response: StoredResponse, request_body: bytes) -> bytes:
        """Starts work on a response that is to be made in the background; the answer to its client."""
        self.put(response)
        call = InnerCall(self.endpoint, PATH, request_body, {RESPONSE_ID_KEY: response.response_id})
        task = asyncio.create_task(self._run(response, call))
        self._running[response.response_id] = (call, task)
        return response.body

    async def _run(self, response: StoredResponse, call: InnerCall) -> None:
        try:
            self._set(response, status="in_progress", is_done=False)
            await call.run()
            if call.status != 200 and self.store.has(response.response_id):
                error = msgspec.json.decode(call.body)["error"] if call.body else {"message": "It was cancelled."}
                self._set(response, status="failed", error={"code": "server_error", "message": error["message"]})
        finally:
            del self._running[response.response_id]

    def _set(self, response: StoredResponse, *, is_done: bool = True, **fields: Any) -> bytes:
        """Changes fields of a response that has no output."""
        body = msgspec.json.encode({**msgspec.json.decode(response.body), **fields})
        self.put(StoredResponse(response.response_id, body, response.input, response.messages, is_done))
        return body

    # Routes: each is a `call.Handler`

    async def retrieve(self, _body: bytes, exchange: Exchange) -> object:
        return self.store.get(_id_of(exchange), self._state.now_s()).body

    async def input_items(self, _body: bytes, exchange: Exchange) -> object:
        response_id = _id_of(exchange)
        items = msgspec.json.decode(self.store.get(response_id, self._state.now_s()).input)
        shown = [{"id": f"in_{response_id.removeprefix('resp_')}_{at}", **item} for at, item in enumerate(items)]
        edges = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {}
        return {"object": "list", "data": shown[::-1], "has_more": False, **edges}

    async def delete(self, _body: bytes, exchange: Exchange) -> object:
        response_id = _id_of(exchange)
        self.store.delete(response_id, self._state.now_s())
        self._leave(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def cancel(self, _body: bytes, exchange: Exchange) -> object:
        """Ends a background response; one that is over stays as it is."""
        response_id = _id_of(exchange)
        found = self.store.get(response_id, self._state.now_s())
        if not msgspec.json.decode(found.body)["background"]:
            raise ValidationError("Only a background response can be cancelled.", param="response_id")
        task = self._leave(response_id)
        if task is None:
            return found.body
        await asyncio.wait((task,))
        return self._set(found, status="cancelled")

    def _leave(self, response_id: str) -> asyncio.Task[None] | None:
        running = self._running.get(response_id)
        if running is None:
            return None
        running[0].leave()
        return running[1]


def _id_of(exchange: Exchange) -> str:
    response_id: str = exchange.scope["path_params"]["response_id"]
    return response_id
