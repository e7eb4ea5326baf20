"""The ASGI application: every route of the server in one table."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
from starlette._utils import get_route_path
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.messages import ErrorInfo
from penstock.observability.metrics import CONTENT_TYPE
from penstock.server.auth import ApiKeyMiddleware
from penstock.server.generate import GenerationEndpoint
from penstock.server.health import progress_report
from penstock.server.local_only import LocalOnlyMiddleware
from penstock.server.openai.chat import ChatFormat
from penstock.server.openai.completions import CompletionFormat
from penstock.server.openai.models import ModelRoutes
from penstock.server.openai.render import error_body
from penstock.server.state import ServerState

# (method, path, what it does): every route there is. docs/api.md and the authentication test enumerate this list.
ROUTES: Final = (
    ("POST", "/v1/chat/completions", "Answers a conversation (OpenAI)."),
    ("POST", "/v1/completions", "Continues texts or token ids (OpenAI)."),
    ("GET", "/v1/models", "The names that are served."),
    ("GET", "/v1/models/{name:path}", "One of them."),
    ("GET", "/health/live", "200 while this process runs, whatever it is busy with."),
    ("GET", "/health/ready", "200 when a request sent now would be served; 503 with the reason otherwise."),
    ("GET", "/health/progress", "200 while work, where it exists, moves; 503 names the step that is stuck."),
    ("GET", "/metrics", "Prometheus' text format."),
)


def routes(state: ServerState) -> list[Route]:
    """The routes with what answers them."""
    health, models = HealthRoutes(state), ModelRoutes(state)
    endpoints: dict[str, Callable[..., Any]] = {
        "/v1/chat/completions": GenerationEndpoint(state, ChatFormat(state)),
        "/v1/completions": GenerationEndpoint(state, CompletionFormat(state)),
        "/v1/models": models.list_models,
        "/v1/models/{name:path}": models.get_model,
        "/health/live": health.live,
        "/health/ready": health.ready,
        "/health/progress": health.progress,
        "/metrics": health.metrics,
    }
    return [Route(path, endpoints[path], methods=[method]) for method, path, _ in ROUTES]


def build_app(state: ServerState) -> ASGIApp:
    """The application, behind the key check, or without keys for this machine alone."""
    table = routes(state)
    inner = Starlette(routes=table, exception_handlers={HTTPException: _http_error, Exception: _unexpected_error})
    # A redirect from /path/ to /path would be a second spelling of every route.
    inner.router.redirect_slashes = False
    app = DirectRoutes(inner, table)
    keys = state.settings.api_key
    return ApiKeyMiddleware(app, keys) if keys else LocalOnlyMiddleware(app)


class DirectRoutes:
    """Hands a generating request straight to its endpoint, which answers every error itself; Starlette does the rest.

    Its layers would take a tenth of the time that such a request may cost this process.
    """

    def __init__(self, app: ASGIApp, table: list[Route]) -> None:
        self._app = app
        self._endpoints = {
            route.path: route.endpoint for route in table if isinstance(route.endpoint, GenerationEndpoint)
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(get_route_path(scope))
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await self._app(scope, receive, send)


class HealthRoutes:
    """live: this process runs. ready: a request sent now would be served. progress: work, where it exists, moves."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def live(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        return _json(200, {"status": "ok"})

    async def ready(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        verdict = self._state.readiness()
        return _json(200 if verdict.is_ok else 503, {"status": verdict.reason})

    async def progress(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        engine = self._state.engine
        if engine is None:
            return _json(503, {"status": self._state.phase.value})
        now_s = time.monotonic()
        verdict = self._state.watchdog.verdict
        report = progress_report(engine.stats, engine.seconds_since_progress(now_s), now_s)
        return _json(200 if verdict.is_ok else 503, {"status": verdict.reason, **report})

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002 - Starlette's signature
        body = self._state.metrics.render(self._state.snapshot())
        return Response(body, headers={"content-type": CONTENT_TYPE})


def _json(status: int, content: dict[str, str | float]) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in the shape that clients parse."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"There is no {request.url.path[:200]} here.",
        405: f"{request.url.path[:200]} does not take {request.method}.",
    }.get(error.status_code, error.detail)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    body = error_body(ErrorInfo(code, error.status_code, message))
    return Response(body, error.status_code, dict(error.headers or {}), "application/json")


async def _unexpected_error(request: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's signature
    return Response(error_body(ErrorInfo.of(error)), 500, media_type="application/json")
