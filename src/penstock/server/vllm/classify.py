"""POST /v1/classify and /classify: the label of each text, and the probabilities of all labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from penstock.frontend.one_pass import vector_of
from penstock.messages import PoolingParams
from penstock.server.body import decode_body
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.one_pass import OnePassFields, PooledAnswer, ask_for
from penstock.server.openai import render
from penstock.server.openai.embeddings import sources_of
from penstock.server.state import ServerState
from penstock.server.vllm.score import UsageBody


class ClassifyRequest(OnePassFields, kw_only=True, forbid_unknown_fields=True):
    """input: a text, texts, token ids, or lists of token ids. activation: false for logits instead of probabilities."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    activation: bool | None = None


_decoder: Final = msgspec.json.Decoder(ClassifyRequest)


class _Verdict(msgspec.Struct):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class _Body(msgspec.Struct, omit_defaults=True):
    id: str
    created: int
    model: str
    data: list[_Verdict]
    usage: UsageBody
    object: Literal["list"]
    warnings: list[render.WarningBody] | None = None


class ClassifyFormat(render.OpenAIErrors):
    """The wire format of the classify endpoint."""

    endpoint = "classify"

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask:
        """Raises ValidationError, UnknownModelError."""
        state = self._state
        request, ignored = decode_body(_decoder, body, lenient=state.settings.lenient)
        model = state.named_model(request.model)
        assert state.text is not None
        labels = state.text.tasks.labels
        return ask_for(
            state,
            exchange,
            arrival_s,
            sources_of(request.input),
            PoolingParams(kind="classify", activate=request.activation is not False),
            _Answer(exchange.request_id, int(state.now_s()), model, labels, ignored),
            request,
        )


class _Answer(PooledAnswer):
    def __init__(
        self, request_id: str, created: int, model: str, labels: Sequence[str], ignored: Sequence[str]
    ) -> None:
        self._id = f"classify-{request_id}"
        self._created = created
        self._model = model
        self._labels = labels
        self._warnings = render.ignored_warnings(ignored) or None

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        data = [self._verdict(choice) for choice in choices]
        tokens = UsageBody(usage.num_prompt_tokens, usage.num_prompt_tokens)
        return render.encode(_Body(self._id, self._created, self._model, data, tokens, "list", self._warnings))

    def _verdict(self, choice: Choice) -> _Verdict:
        scores = vector_of(choice.pooled).tolist()
        return _Verdict(choice.index, self._labels[scores.index(max(scores))], scores, len(scores))
