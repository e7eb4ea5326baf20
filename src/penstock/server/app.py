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
from penstock.server.anthropic.messages import CountTokens, MessagesFormat
from penstock.server.anthropic.messages import error_body as anthropic_error
from penstock.server.auth import ApiKeyMiddleware
from penstock.server.call import CallEndpoint
from penstock.server.cohere.rerank import RerankFormat
from penstock.server.exchange import Exchange
from penstock.server.generate import GenerationEndpoint
from penstock.server.health import progress_report
from penstock.server.local_only import LocalOnlyMiddleware
from penstock.server.ollama.embed import EmbedFormat
from penstock.server.ollama.generate import OllamaFormat
from penstock.server.ollama.generate import error_body as ollama_error
from penstock.server.ollama.models import OllamaModels
from penstock.server.openai.batches import Batches
from penstock.server.openai.chat import ChatFormat
from penstock.server.openai.completions import CompletionFormat
from penstock.server.openai.embeddings import EmbeddingFormat
from penstock.server.openai.files import Files
from penstock.server.openai.models import ModelRoutes
from penstock.server.openai.render import error_body
from penstock.server.openai.response_routes import Responses
from penstock.server.openai.responses import ResponsesFormat
from penstock.server.openai.token_generate import GenerateFormat
from penstock.server.openai.tokens import TokenRoutes
from penstock.server.state import ServerState
from penstock.server.tgi.embed import TeiEmbedFormat
from penstock.server.tgi.generate import TgiFormat
from penstock.server.tgi.generate import error_body as tgi_error
from penstock.server.tgi.info import TgiRoutes
from penstock.server.vllm.classify import ClassifyFormat
from penstock.server.vllm.score import ScoreFormat

# (method, path, what it does): every route there is. docs/api.md and the authentication test enumerate this list.
ROUTES: Final = (
    ("POST", "/v1/chat/completions", "Answers a conversation (OpenAI)."),
    ("POST", "/v1/completions", "Continues texts or token ids (OpenAI)."),
    ("POST", "/v1/embeddings", "Vectors of texts or token ids (OpenAI)."),
    ("POST", "/v1/score", "Scores pairs of texts (vLLM)."),
    ("POST", "/score", "The same."),
    ("POST", "/v1/classify", "Labels texts or token ids (vLLM)."),
    ("POST", "/classify", "The same."),
    ("POST", "/v2/rerank", "Orders documents by a query (Cohere, Jina)."),
    ("POST", "/v1/rerank", "The same."),
    ("POST", "/rerank", "The same."),
    ("POST", "/v1/generate", "Continues token ids or a text, and gives token ids back (our own)."),
    ("POST", "/v1/render", "The prompt that a chat request would become (our own)."),
    ("POST", "/detokenize", "Token ids to text (vLLM)."),
    ("POST", "/v1/responses", "Answers, and keeps the answer (OpenAI)."),
    ("GET", "/v1/responses/{response_id}", "A kept answer (OpenAI)."),
    ("DELETE", "/v1/responses/{response_id}", "Deletes one (OpenAI)."),
    ("POST", "/v1/responses/{response_id}/cancel", "Ends one that is made in the background (OpenAI)."),
    ("GET", "/v1/responses/{response_id}/input_items", "What one answered to (OpenAI)."),
    ("POST", "/v1/files", "Uploads a file (OpenAI)."),
    ("GET", "/v1/files", "The files there are (OpenAI)."),
    ("GET", "/v1/files/{file_id}", "What is known of one (OpenAI)."),
    ("GET", "/v1/files/{file_id}/content", "Downloads one (OpenAI)."),
    ("DELETE", "/v1/files/{file_id}", "Deletes one (OpenAI)."),
    ("POST", "/v1/batches", "Begins a job of many requests (OpenAI)."),
    ("GET", "/v1/batches", "The batches there are (OpenAI)."),
    ("GET", "/v1/batches/{batch_id}", "How far one is (OpenAI)."),
    ("POST", "/v1/batches/{batch_id}/cancel", "Ends one; what is done stays (OpenAI)."),
    ("GET", "/v1/models", "The names that are served."),
    ("GET", "/v1/models/{name:path}", "One of them."),
    ("POST", "/v1/messages", "Answers a conversation (Anthropic)."),
    ("POST", "/v1/messages/count_tokens", "Counts a conversation's tokens (Anthropic)."),
    ("POST", "/api/chat", "Answers a conversation (Ollama)."),
    ("POST", "/api/generate", "Answers a prompt (Ollama)."),
    ("POST", "/api/embed", "Vectors of texts (Ollama)."),
    ("GET", "/api/tags", "The models there are (Ollama)."),
    ("GET", "/api/ps", "The models that are loaded (Ollama)."),
    ("POST", "/api/show", "What is known of a model (Ollama)."),
    ("GET", "/api/version", "The version of Ollama's API (Ollama)."),
    ("POST", "/", "Continues a text, streamed or not (TGI)."),
    ("POST", "/generate", "Continues a text (TGI)."),
    ("POST", "/generate_stream", "Continues a text, streamed (TGI)."),
    ("POST", "/embed", "Vectors of texts (TEI, for huggingface_hub's feature_extraction)."),
    ("GET", "/info", "What is served, and its limits (TGI)."),
    ("POST", "/tokenize", "Text to token ids: of `inputs` (TGI), or of `prompt` or `messages` (vLLM)."),
    ("GET", "/health", "The same as /health/ready (TGI, vLLM)."),
    ("GET", "/health/live", "200 while this process runs, whatever it is busy with."),
    ("GET", "/health/ready", "200 when a request sent now would be served; 503 with the reason otherwise."),
    ("GET", "/health/progress", "200 while work, where it exists, moves; 503 names the step that is stuck."),
    ("GET", "/metrics", "Prometheus' text format."),
    ("GET", "/openapi.json", "These routes and their requests, for programs (OpenAPI 3.1)."),
)


def routes(state: ServerState) -> list[Route]:
    """The routes with what answers them."""
    health, models, tokens = HealthRoutes(state), ModelRoutes(state), TokenRoutes(state)
    chat = GenerationEndpoint(state, ChatFormat(state))
    completions = GenerationEndpoint(state, CompletionFormat(state))
    embeddings = GenerationEndpoint(state, EmbeddingFormat(state))

    async def document(_body: bytes, _exchange: Exchange) -> object:
        from penstock.server.openapi import openapi_document

        return openapi_document(ROUTES, state.info.version, state.model_names)

    endpoints: dict[str, Callable[..., Any]] = {
        "POST /v1/chat/completions": chat,
        "POST /v1/completions": completions,
        "POST /v1/embeddings": embeddings,
        "POST /v1/generate": GenerationEndpoint(state, GenerateFormat(state)),
        "POST /v1/render": CallEndpoint(state, tokens.render, error_body),
        "POST /detokenize": CallEndpoint(state, tokens.detokenize, error_body),
        "GET /health": health.ready,
        "GET /openapi.json": CallEndpoint(state, document, error_body),
        **_stateful(
            state, {"/v1/chat/completions": chat, "/v1/completions": completions, "/v1/embeddings": embeddings}
        ),
        **_one_pass(state),
        **_other_protocols(state, tokens),
        "GET /v1/models": models.list_models,
        "GET /v1/models/{name:path}": models.get_model,
        "GET /health/live": health.live,
        "GET /health/ready": health.ready,
        "GET /health/progress": health.progress,
        "GET /metrics": health.metrics,
    }
    return [Route(path, endpoints[f"{method} {path}"], methods=[method]) for method, path, _ in ROUTES]


def _stateful(state: ServerState, in_batches: dict[str, ASGIApp]) -> dict[str, Callable[..., Any]]:
    """OpenAI's routes that keep something. in_batches: what a batch may ask for beside responses, by path."""
    responses = Responses(state)
    responses.endpoint = GenerationEndpoint(state, ResponsesFormat(state, responses))
    files = Files(state)
    batches = Batches(state, files, {**in_batches, "/v1/responses": responses.endpoint})
    state.when_serving.append(batches.start)
    return {
        "POST /v1/files": CallEndpoint(state, files.upload, error_body),
        "GET /v1/files": CallEndpoint(state, files.list_files, error_body),
        "GET /v1/files/{file_id}": CallEndpoint(state, files.retrieve, error_body),
        "GET /v1/files/{file_id}/content": CallEndpoint(state, files.content, error_body),
        "DELETE /v1/files/{file_id}": CallEndpoint(state, files.delete, error_body),
        "POST /v1/batches": CallEndpoint(state, batches.create, error_body),
        "GET /v1/batches": CallEndpoint(state, batches.list_batches, error_body),
        "GET /v1/batches/{batch_id}": CallEndpoint(state, batches.retrieve, error_body),
        "POST /v1/batches/{batch_id}/cancel": CallEndpoint(state, batches.cancel, error_body),
        "POST /v1/responses": responses.endpoint,
        "GET /v1/responses/{response_id}": CallEndpoint(state, responses.retrieve, error_body),
        "DELETE /v1/responses/{response_id}": CallEndpoint(state, responses.delete, error_body),
        "POST /v1/responses/{response_id}/cancel": CallEndpoint(state, responses.cancel, error_body),
        "GET /v1/responses/{response_id}/input_items": CallEndpoint(state, responses.input_items, error_body),
    }


def _one_pass(state: ServerState) -> dict[str, Callable[..., Any]]:
    """vLLM's, Cohere's and Jina's routes, with and without a version."""
    scores = GenerationEndpoint(state, ScoreFormat(state))
    labels = GenerationEndpoint(state, ClassifyFormat(state))
    rankings = GenerationEndpoint(state, RerankFormat(state))
    return {
        **dict.fromkeys(("POST /v1/score", "POST /score"), scores),
        **dict.fromkeys(("POST /v1/classify", "POST /classify"), labels),
        **dict.fromkeys(("POST /v2/rerank", "POST /v1/rerank", "POST /rerank"), rankings),
    }


def _other_protocols(state: ServerState, tokens: TokenRoutes) -> dict[str, Callable[..., Any]]:
    """Anthropic's, Ollama's and TGI's routes."""
    described, texts = OllamaModels(state), TgiRoutes(state)

    async def tokenize(body: bytes, exchange: Exchange) -> object:
        """TGI's body has `inputs`, vLLM's `prompt` or `messages`."""
        return await (texts.tokenize if b'"inputs"' in body else tokens.tokenize)(body, exchange)

    return {
        "POST /v1/messages": GenerationEndpoint(state, MessagesFormat(state)),
        "POST /v1/messages/count_tokens": CallEndpoint(state, CountTokens(state), anthropic_error),
        "POST /api/chat": GenerationEndpoint(state, OllamaFormat(state, "ollama_chat")),
        "POST /api/generate": GenerationEndpoint(state, OllamaFormat(state, "ollama_generate")),
        "POST /api/embed": GenerationEndpoint(state, EmbedFormat(state)),
        "GET /api/tags": CallEndpoint(state, described.tags, ollama_error),
        "GET /api/ps": CallEndpoint(state, described.running, ollama_error),
        "POST /api/show": CallEndpoint(state, described.show, ollama_error),
        "GET /api/version": CallEndpoint(state, described.version, ollama_error),
        "POST /": GenerationEndpoint(state, TgiFormat(state, streams=None, in_list=True)),
        "POST /generate": GenerationEndpoint(state, TgiFormat(state, streams=False)),
        "POST /generate_stream": GenerationEndpoint(state, TgiFormat(state, streams=True)),
        "POST /embed": GenerationEndpoint(state, TeiEmbedFormat(state)),
        "GET /info": CallEndpoint(state, texts.info, tgi_error),
        "POST /tokenize": CallEndpoint(state, tokenize, error_body),
    }


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

    async def live(self, _request: Request) -> Response:
        return _json(200, {"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        verdict = self._state.readiness()
        return _json(200 if verdict.is_ok else 503, {"status": verdict.reason})

    async def progress(self, _request: Request) -> Response:
        engine = self._state.engine
        if engine is None:
            return _json(503, {"status": self._state.phase.value})
        now_s = time.monotonic()
        verdict = self._state.watchdog.verdict
        report = progress_report(engine.stats, engine.seconds_since_progress(now_s), now_s)
        return _json(200 if verdict.is_ok else 503, {"status": verdict.reason, **report})

    async def metrics(self, _request: Request) -> Response:
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


async def _unexpected_error(_request: Request, error: Exception) -> Response:
    return Response(error_body(ErrorInfo.of(error)), 500, media_type="application/json")
