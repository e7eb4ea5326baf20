"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from penstock.base.errors import PenstockError
from penstock.messages import ErrorInfo
from penstock.server.openai import render
from penstock.server.state import ServerState


class _Model(msgspec.Struct):
    """max_model_len: vLLM's addition; null while the model loads."""

    id: str
    created: int
    max_model_len: int | None
    root: str
    object: str = "model"
    owned_by: str = "penstock"
    parent: None = None


class _ModelList(msgspec.Struct):
    data: list[_Model]
    object: str = "list"


class ModelRoutes:
    """Handlers for the list of served names."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def list_models(self, _request: Request) -> Response:
        body = _ModelList([self._describe(name) for name in self._state.model_names])
        return Response(render.encode(body), media_type="application/json")

    async def get_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            self._state.check_model(name)
        except PenstockError as error:
            return error_response(error)
        return Response(render.encode(self._describe(name)), media_type="application/json")

    def _describe(self, name: str) -> _Model:
        state = self._state
        max_model_len = state.engine.ready.max_model_len if state.engine is not None else None
        return _Model(name, state.created_s, max_model_len, state.model_names[0])


def error_response(error: PenstockError) -> Response:
    """An error as an answer in OpenAI's shape."""
    info = ErrorInfo.of(error)
    return Response(render.error_body(info), status_code=info.status, media_type="application/json")
