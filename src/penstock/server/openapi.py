"""GET /openapi.json: the routes and the types of their requests, made from the code that decodes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from penstock.messages.bounds import BOUNDS, MAX_ENTRIES
from penstock.server.anthropic import schema as anthropic
from penstock.server.auth import PUBLIC_PATHS
from penstock.server.cohere.rerank import RerankRequest
from penstock.server.ollama import schema as ollama
from penstock.server.ollama.embed import EmbedRequest
from penstock.server.openai import batches, files, render, response_schema
from penstock.server.openai import schema as openai
from penstock.server.openai.embeddings import EmbeddingRequest
from penstock.server.tgi import schema as tgi
from penstock.server.tgi.embed import TeiEmbedRequest
from penstock.server.vllm.classify import ClassifyRequest
from penstock.server.vllm.score import ScoreRequest

# What each route's body is decoded into; several where its shape decides.
REQUESTS: Final[dict[str, tuple[type, ...]]] = {
    "POST /v1/chat/completions": (openai.ChatRequest,),
    "POST /v1/completions": (openai.CompletionRequest,),
    "POST /v1/embeddings": (EmbeddingRequest,),
    **dict.fromkeys(("POST /v1/score", "POST /score"), (ScoreRequest,)),
    **dict.fromkeys(("POST /v1/classify", "POST /classify"), (ClassifyRequest,)),
    **dict.fromkeys(("POST /v2/rerank", "POST /v1/rerank", "POST /rerank"), (RerankRequest,)),
    "POST /v1/generate": (openai.GenerateRequest,),
    "POST /v1/render": (openai.ChatRequest,),
    "POST /tokenize": (openai.TokenizeRequest, tgi.TokenizeRequest),
    "POST /detokenize": (openai.DetokenizeRequest,),
    "POST /v1/responses": (response_schema.ResponseRequest,),
    "POST /v1/batches": (batches.BatchRequest,),
    "POST /v1/messages": (anthropic.MessagesRequest,),
    "POST /v1/messages/count_tokens": (anthropic.CountTokensRequest,),
    "POST /api/chat": (ollama.ChatRequest,),
    "POST /api/generate": (ollama.GenerateRequest,),
    "POST /api/embed": (EmbedRequest,),
    "POST /api/show": (ollama.ShowRequest,),
    "POST /": (tgi.GenerateRequest,),
    "POST /embed": (TeiEmbedRequest,),
    "POST /generate": (tgi.GenerateRequest,),
    "POST /generate_stream": (tgi.GenerateRequest,),
}
# Routes that can answer in a stream, and its content type.
STREAMS: Final[dict[str, str]] = {
    **dict.fromkeys(
        ("POST /v1/chat/completions", "POST /v1/completions", "POST /v1/generate", "POST /v1/responses",
         "POST /v1/messages", "POST /", "POST /generate_stream"),
        "text/event-stream",
    ),
    "POST /api/chat": "application/x-ndjson",
    "POST /api/generate": "application/x-ndjson",
}  # fmt: skip
_NO_OPS: Final[dict[str, Mapping[str, tuple[Any, ...]]]] = {
    openai.__name__: openai.NO_OP_VALUES,
    response_schema.__name__: response_schema.NO_OP_VALUES,
    anthropic.__name__: anthropic.NO_OP_VALUES,
    ollama.__name__: {**ollama.NO_OP_VALUES, **ollama.NO_OP_OPTIONS},
    tgi.__name__: tgi.NO_OP_VALUES,
}
_LISTS: Final = {"GET /v1/batches": batches.MAX_LISTED, "GET /v1/files": files.MAX_LISTED}  # and their longest page
_TEXT: Final = {"type": "string"}
_UPLOAD: Final = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": ["batch", "user_data"]}},
    "additionalProperties": False,
}


def openapi_document(table: Iterable[tuple[str, str, str]], version: str, models: Sequence[str]) -> dict[str, Any]:
    """An OpenAPI 3.1 document. table: method, path and description of every route. version: Penstock's.

    models: the names that are served.
    """
    types = list(dict.fromkeys(one for request in REQUESTS.values() for one in request))
    schemas, components = msgspec.json.schema_components(
        [*types, render.ErrorBody], ref_template="#/components/schemas/{name}"
    )
    by_type = dict(zip([*types, render.ErrorBody], schemas, strict=True))
    requests = {route: [by_type[one] for one in request] for route, request in REQUESTS.items()}
    _add_bounds(components)
    _add_models(components, models)
    _add_no_ops(components)
    paths: dict[str, dict[str, Any]] = {}
    for method, path, description in table:
        route = f"{method} {path}"
        operation = _operation(route, description, requests.get(route, []), by_type[render.ErrorBody])
        paths.setdefault(path.replace(":path", ""), {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: str, description: str, requests: list[Any], error: Any) -> dict[str, Any]:
    method, path = route.split(" ")
    answer: dict[str, Any] = {"application/json": {"schema": {}}}
    if route in STREAMS:
        answer[STREAMS[route]] = {"schema": _TEXT}
    if path == "/metrics":
        answer = {"text/plain": {"schema": _TEXT}}
    operation: dict[str, Any] = {
        "summary": description,
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
        "responses": {
            "200": {"description": "The answer.", "content": answer},
            "default": {"description": "An error.", "content": {"application/json": {"schema": error}}},
        },
        "security": [] if path in PUBLIC_PATHS else [{"key": []}],
    }
    names = re.findall(r"{(\w+)", path)
    if names:
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]
    if route in _LISTS:
        limit = {"type": "integer", "minimum": 1, "maximum": _LISTS[route]}
        operation["parameters"] = [
            {"name": "after", "in": "query", "schema": _TEXT},
            {"name": "limit", "in": "query", "schema": limit},
        ]
        if route == "GET /v1/files":
            operation["parameters"].append({"name": "purpose", "in": "query", "schema": _TEXT})
    if route == "POST /v1/files":
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}
    elif requests:
        request = requests[0] if len(requests) == 1 else {"anyOf": requests}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": request}}}
    return operation


def _add_bounds(components: dict[str, Any]) -> None:
    """The table of bounds, written into every field that it governs."""
    for component in components.values():
        for name, schema in component.get("properties", {}).items():
            for one in schema.get("anyOf", [schema]):
                if one.get("type") in ("integer", "number") and name in BOUNDS:
                    one["minimum"], one["maximum"] = BOUNDS[name]
                elif one.get("type") == "array" and name in MAX_ENTRIES:
                    one["maxItems"] = MAX_ENTRIES[name]


def _add_models(components: dict[str, Any], models: Sequence[str]) -> None:
    """The served names, for every field that takes one. (Ollama's routes also take them with `:latest`.)"""
    for component in components.values():
        schema = component.get("properties", {}).get("model", {})
        for one in schema.get("anyOf", [schema]):
            if one.get("type") == "string":
                one["enum"] = list(models)


def _add_no_ops(components: dict[str, Any]) -> None:
    """Known fields that are not supported: the values that ask for what happens anyway."""
    requests = (one for request in REQUESTS.values() for one in request)
    for request_type in (*requests, ollama.Options, tgi.Parameters):
        allowed = _NO_OPS.get(request_type.__module__, {})
        full_name = f"{request_type.__module__}.{request_type.__name__}"
        component = components.get(full_name) or components.get(request_type.__name__, {})
        for name, schema in component.get("properties", {}).items():
            if name in allowed and "type" not in schema and "anyOf" not in schema:
                component["properties"][name] = {**schema, "enum": [None, *allowed[name]]}
