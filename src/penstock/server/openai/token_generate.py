"""POST /v1/generate: token ids in and out, for programs that keep their own tokenizer. Our own format.

TGI's route of nearly the same name, /generate, takes and gives text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.base.errors import ValidationError
from penstock.frontend.output import LogprobEntry, TextOutput
from penstock.server.body import decode_body
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.openai import decode, render
from penstock.server.openai.schema import GenerateRequest
from penstock.server.state import ServerState
from penstock.server.text import GenerationRequest

_decoder = msgspec.json.Decoder(GenerateRequest)


class GenerateFormat(render.OpenAIErrors):
    """The wire format of the endpoint."""

    endpoint = "generate"

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask:
        """Raises ValidationError, UnknownModelError."""
        state = self._state
        request, ignored = decode_body(_decoder, body, lenient=state.settings.lenient)
        decode.check_request(request)
        state.check_model(request.model)
        state.check_priority(request.priority)
        if (request.token_ids is None) is (request.prompt is None):
            raise ValidationError("Give either token_ids or prompt.", param="token_ids")
        timeout_s = exchange.timeout_s(state.settings.request_timeout)
        if request.prompt_logprobs is not None:
            raise ValidationError("prompt_logprobs is not supported here.", param="prompt_logprobs")
        generation = GenerationRequest(
            request_id=state.new_id(),
            prompts=[request.token_ids or [] if request.prompt is None else request.prompt],
            sampling=decode.generate_sampling(request),
            beams=decode.beams_of(request),
            namespace=request.cache_salt or "",
            priority=request.priority or 0,
            arrival_s=arrival_s,
            deadline_s=arrival_s + timeout_s,
            add_special_tokens=request.add_special_tokens is not False,
        )
        answer = GenerateAnswer(exchange.request_id, request, ignored)
        return Ask(generation, answer, bool(request.stream), request.user or "", request.metadata or {})


class GenerateAnswer:
    """Renders token ids, their text, and log-probabilities where they were asked for."""

    def __init__(self, request_id: str, request: GenerateRequest, ignored: Sequence[str]) -> None:
        self._id = f"gen-{request_id}"
        self._model = request.model
        self._num_top = request.logprobs
        self._warnings = render.ignored_warnings(ignored)

    def event(self, choice: Choice, delta: TextOutput) -> bytes:
        if not delta.token_ids and not delta.text and delta.finish_reason is None:
            return b""
        fields = self._fields(choice, delta.token_ids, delta.text, delta.logprobs, is_last=bool(delta.finish_reason))
        return b"data: " + render.encode({"id": self._id, **fields}) + b"\n\n"

    def last_events(self, usage: Usage) -> bytes:
        return b"data: " + render.encode({"id": self._id, **self._tail(usage)}) + b"\n\n" + render.DONE

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        shown = [
            self._fields(choice, choice.token_ids, choice.text, choice.logprobs, is_last=True) for choice in choices
        ]
        return render.encode({"id": self._id, "choices": shown, **self._tail(usage)})

    def _tail(self, usage: Usage) -> dict[str, Any]:
        tail: dict[str, Any] = {"model": self._model, "usage": render.usage_body(usage)}
        return {**tail, "warnings": self._warnings} if self._warnings else tail

    def _fields(
        self, choice: Choice, token_ids: list[int], text: str, logprobs: list[LogprobEntry] | None, *, is_last: bool
    ) -> dict[str, Any]:
        fields: dict[str, Any] = {"index": choice.index, "token_ids": token_ids, "text": text}
        if logprobs is not None:
            fields["logprobs"] = render.chat_logprobs(logprobs, self._num_top or 0).content
        fields["finish_reason"] = choice.finish_reason if is_last else None
        if is_last and choice.stop_reason is not None:
            fields["stop_reason"] = choice.stop_reason
        return fields
