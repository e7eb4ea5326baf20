"""POST /rerank, /v1/rerank and /v2/rerank: documents by how well they fit a query.

One answer holds what Cohere's clients read (id, results, meta) and what Jina's do (model, results, usage).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from penstock.base.errors import ValidationError
from penstock.frontend.one_pass import ScorePlan, plan_scores, ranking
from penstock.messages import ErrorInfo
from penstock.messages.sampling import check_bound
from penstock.server.body import decode_body
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.one_pass import OnePassFields, PooledAnswer, ask_for
from penstock.server.state import ServerState

_encode: Final = msgspec.json.Encoder().encode


class TextDocument(msgspec.Struct, forbid_unknown_fields=True):
    text: str


class RerankRequest(OnePassFields, kw_only=True, forbid_unknown_fields=True):
    """return_documents: with their texts in the results, which is the default. max_chunks_per_doc, max_tokens_per_doc:
    Cohere's ways of cutting documents; only null passes."""

    model: str
    query: str
    documents: list[str | TextDocument]
    top_n: int | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: None = None
    max_chunks_per_doc: None = None
    rank_fields: None = None


_decoder: Final = msgspec.json.Decoder(RerankRequest)


class _Result(msgspec.Struct, omit_defaults=True):
    index: int
    relevance_score: float
    document: TextDocument | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class _BilledUnits(msgspec.Struct):
    search_units: int


class _Meta(msgspec.Struct, omit_defaults=True):
    billed_units: _BilledUnits
    warnings: list[str] | None = None


class _Body(msgspec.Struct):
    id: str
    model: str
    results: list[_Result]
    usage: _Usage
    meta: _Meta


class _ErrorBody(msgspec.Struct):
    message: str
    code: str
    param: str | None


class RerankFormat:
    """The wire format of the rerank endpoint."""

    endpoint = "rerank"

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask:
        """Raises ValidationError, UnknownModelError."""
        state = self._state
        request, ignored = decode_body(_decoder, body, lenient=state.settings.lenient)
        state.check_model(request.model)
        if request.top_n is not None:
            check_bound("top_n", request.top_n)
        if not request.documents:
            raise ValidationError("documents is empty.", param="documents")
        assert state.text is not None
        state.text.tasks.check("rerank")
        documents = [one if isinstance(one, str) else one.text for one in request.documents]
        plan = plan_scores(state.text.tasks, [request.query], documents)
        return ask_for(
            state,
            exchange,
            arrival_s,
            plan.sources,
            plan.pooling,
            _Answer(exchange.request_id, request, plan, documents, ignored),
            request,
        )

    def error_body(self, error: ErrorInfo) -> bytes:
        return _encode(_ErrorBody(error.message, error.code, error.param))

    def error_event(self, error: ErrorInfo) -> bytes:
        return self.error_body(error)


class _Answer(PooledAnswer):
    def __init__(
        self,
        request_id: str,
        request: RerankRequest,
        plan: ScorePlan,
        documents: Sequence[str],
        ignored: Sequence[str],
    ) -> None:
        self._id = f"rerank-{request_id}"
        self._model = request.model
        self._top_n = request.top_n
        self._documents = documents if request.return_documents is not False else None
        self._plan = plan
        self._warnings = [f"{name} is not a known field and was left out." for name in ignored] or None

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        scores = self._plan.scores([choice.pooled for choice in choices])
        results = [_Result(index, scores[index], self._document(index)) for index in ranking(scores, self._top_n)]
        tokens = _Usage(usage.num_prompt_tokens, usage.num_prompt_tokens)
        return _encode(_Body(self._id, self._model, results, tokens, _Meta(_BilledUnits(1), self._warnings)))

    def _document(self, index: int) -> TextDocument | None:
        return TextDocument(self._documents[index]) if self._documents is not None else None
