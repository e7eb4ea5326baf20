"""POST /v1/score and /score: how well two texts fit, for pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from penstock.frontend.one_pass import ScorePlan, plan_scores
from penstock.server.body import decode_body
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.one_pass import OnePassFields, PooledAnswer, ask_for
from penstock.server.openai import render
from penstock.server.state import ServerState


class ScoreRequest(OnePassFields, kw_only=True, forbid_unknown_fields=True):
    """text_1: one text, scored with each of text_2; or as many as there. activation: false for logits."""

    text_1: str | list[str]
    text_2: str | list[str]
    model: str | None = None
    activation: bool | None = None


_decoder: Final = msgspec.json.Decoder(ScoreRequest)


class _Score(msgspec.Struct):
    index: int
    score: float
    object: str = "score"


class UsageBody(msgspec.Struct):
    """No tokens are generated here."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class _Body(msgspec.Struct, omit_defaults=True):
    id: str
    created: int
    model: str
    data: list[_Score]
    usage: UsageBody
    object: Literal["list"]
    warnings: list[render.WarningBody] | None = None


class ScoreFormat(render.OpenAIErrors):
    """The wire format of the score endpoint."""

    endpoint = "score"

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask:
        """Raises ValidationError, UnknownModelError."""
        state = self._state
        request, ignored = decode_body(_decoder, body, lenient=state.settings.lenient)
        model = state.named_model(request.model)
        assert state.text is not None
        firsts, seconds = ([texts] if isinstance(texts, str) else texts for texts in (request.text_1, request.text_2))
        plan = plan_scores(state.text.tasks, firsts, seconds, activate=request.activation is not False)
        return ask_for(
            state,
            exchange,
            arrival_s,
            plan.sources,
            plan.pooling,
            _Answer(exchange.request_id, int(state.now_s()), model, plan, ignored),
            request,
        )


class _Answer(PooledAnswer):
    def __init__(self, request_id: str, created: int, model: str, plan: ScorePlan, ignored: Sequence[str]) -> None:
        self._id = f"score-{request_id}"
        self._created = created
        self._model = model
        self._plan = plan
        self._warnings = render.ignored_warnings(ignored) or None

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        scores = self._plan.scores([choice.pooled for choice in choices])
        data = [_Score(index, score) for index, score in enumerate(scores)]
        tokens = UsageBody(usage.num_prompt_tokens, usage.num_prompt_tokens)
        return render.encode(_Body(self._id, self._created, self._model, data, tokens, "list", self._warnings))
