"""POST /api/embed: Ollama's vectors. What is too long is cut unless `truncate` is false, as Ollama documents."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from penstock.frontend.one_pass import vector_of
from penstock.messages import PoolingParams
from penstock.server.body import decode_body, ignored_fields
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.ollama.generate import OllamaErrors, encode, model_name
from penstock.server.one_pass import TO_THE_CONTEXT, OnePassFields, PooledAnswer, ask_for
from penstock.server.state import ServerState

_NS: Final = 1_000_000_000


class EmbedOptions(msgspec.Struct, forbid_unknown_fields=True):
    """None of Ollama's model parameters changes a vector."""


class EmbedRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """keep_alive: accepted; the model stays loaded as long as the server runs."""

    model: str
    input: str | list[str]
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: str | float | None = None
    options: EmbedOptions | None = None


_decoder: Final = msgspec.json.Decoder(EmbedRequest)


class EmbedFormat(OllamaErrors):
    """The wire format of the embed endpoint."""

    endpoint = "ollama_embed"

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask | bytes:
        """Raises ValidationError, UnknownModelError."""
        state = self._state
        request, ignored = decode_body(_decoder, body, lenient=state.settings.lenient)
        model_name(state, request.model)
        return ask_for(
            state,
            exchange,
            arrival_s,
            [request.input] if isinstance(request.input, str) else request.input,
            PoolingParams(kind="embed", dimensions=request.dimensions),
            _Answer(request.model, arrival_s, ignored),
            OnePassFields(truncate_prompt_tokens=None if request.truncate is False else TO_THE_CONTEXT),
        )


class _Answer(PooledAnswer):
    def __init__(self, model: str, arrival_s: float, ignored: Sequence[str]) -> None:
        self._model = model
        self._arrival_s = arrival_s
        self._warnings = ignored_fields(ignored)

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        answer: dict[str, Any] = {
            "model": self._model,
            "embeddings": [vector_of(choice.pooled).tolist() for choice in choices],
            "total_duration": int((time.monotonic() - self._arrival_s) * _NS),
            "load_duration": 0,
            "prompt_eval_count": usage.num_prompt_tokens,
        }
        return encode({**answer, "warnings": self._warnings} if self._warnings else answer)
