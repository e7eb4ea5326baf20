"""POST /v1/embeddings: texts or token ids in, vectors out."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from penstock.base.errors import ValidationError
from penstock.frontend.one_pass import Source, vector_of
from penstock.messages import PoolingParams
from penstock.server.body import decode_body
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.one_pass import OnePassFields, PooledAnswer, ask_for
from penstock.server.openai import render
from penstock.server.state import ServerState


class EmbeddingRequest(OnePassFields, kw_only=True, forbid_unknown_fields=True):
    """input: a text, texts, token ids, or lists of token ids. normalize: vLLM's addition."""

    input: str | list[str | int | list[int]]
    model: str
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    normalize: bool | None = None


_decoder: Final = msgspec.json.Decoder(EmbeddingRequest)


class _Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class _Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class _Body(msgspec.Struct, omit_defaults=True):
    data: list[_Embedding]
    model: str
    usage: _Usage
    object: Literal["list"]
    warnings: list[render.WarningBody] | None = None


class EmbeddingFormat(render.OpenAIErrors):
    """The wire format of the embeddings endpoint."""

    endpoint = "embeddings"

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask:
        """Raises ValidationError, UnknownModelError."""
        state = self._state
        request, ignored = decode_body(_decoder, body, lenient=state.settings.lenient)
        state.check_model(request.model)
        return ask_for(
            state,
            exchange,
            arrival_s,
            sources_of(request.input),
            PoolingParams(kind="embed", dimensions=request.dimensions, normalize=request.normalize),
            _Answer(request, ignored),
            request,
        )


class _Answer(PooledAnswer):
    def __init__(self, request: EmbeddingRequest, ignored: Sequence[str]) -> None:
        self._model = request.model
        self._is_base64 = request.encoding_format == "base64"
        self._warnings = render.ignored_warnings(ignored) or None

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        data = [_Embedding(choice.index, self._encoded(choice.pooled)) for choice in choices]
        tokens = usage.num_prompt_tokens
        return render.encode(_Body(data, self._model, _Usage(tokens, tokens), "list", self._warnings))

    def _encoded(self, pooled: bytes) -> list[float] | str:
        return base64.b64encode(pooled).decode() if self._is_base64 else vector_of(pooled).tolist()


def sources_of(value: str | list[str | int | list[int]]) -> list[Source]:
    """The inputs: one text, one list of token ids, or several of either. Raises ValidationError."""
    if isinstance(value, str):
        return [value]
    if value and all(isinstance(item, int) for item in value):
        return [[item for item in value if isinstance(item, int)]]
    sources: list[Source] = []
    for item in value:
        if isinstance(item, int) or type(item) is not type(value[0]):
            raise ValidationError("input mixes texts and token ids.", remedy="Send one kind.", param="input")
        sources.append(item)
    return sources
