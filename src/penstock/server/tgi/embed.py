"""POST /embed: the vectors of text-embeddings-inference, which huggingface_hub's feature_extraction asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from penstock.frontend.one_pass import vector_of
from penstock.messages import ErrorInfo, PoolingParams
from penstock.server.body import decode_body
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.one_pass import TO_THE_CONTEXT, OnePassFields, PooledAnswer, ask_for
from penstock.server.state import ServerState
from penstock.server.tgi.generate import encode, error_body


class TeiEmbedRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """truncate: cut what is too long instead of refusing it. prompt_name: the checkpoint's prompts are not used; only
    null passes."""

    inputs: str | list[str]
    normalize: bool | None = None
    truncate: bool | None = None
    truncation_direction: Literal["right", "Right"] | None = None
    dimensions: int | None = None
    encoding_format: Literal["float"] | None = None
    prompt_name: None = None


_decoder: Final = msgspec.json.Decoder(TeiEmbedRequest)


class TeiEmbedFormat:
    """The wire format of the endpoint. Its answer is a bare list of vectors: what cannot be warned of is refused."""

    endpoint = "tei_embed"

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask:
        """Raises ValidationError."""
        request, _ = decode_body(_decoder, body)
        return ask_for(
            self._state,
            exchange,
            arrival_s,
            [request.inputs] if isinstance(request.inputs, str) else request.inputs,
            PoolingParams(kind="embed", dimensions=request.dimensions, normalize=request.normalize),
            _Answer(),
            OnePassFields(truncate_prompt_tokens=TO_THE_CONTEXT if request.truncate else None),
        )

    def error_body(self, error: ErrorInfo) -> bytes:
        return error_body(error)

    def error_event(self, error: ErrorInfo) -> bytes:
        return error_body(error)


class _Answer(PooledAnswer):
    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:  # noqa: ARG002 - the counts are not shown
        return encode([vector_of(choice.pooled).tolist() for choice in choices])
