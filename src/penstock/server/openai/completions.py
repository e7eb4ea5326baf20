"""POST /v1/completions: OpenAI's older text format in and out."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.base.errors import ValidationError
from penstock.messages import ErrorInfo
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.openai import decode, render
from penstock.server.openai.schema import CompletionRequest
from penstock.server.state import ServerState
from penstock.server.text import GenerationRequest, TextDelta, TokenText


class _Choice(msgspec.Struct, omit_defaults=True):
    index: int
    text: str
    logprobs: render.CompletionLogprobs | None
    finish_reason: str
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[int, render.PromptLogprob] | None] | None = None


class _Body(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[_Choice]
    usage: render.UsageBody
    system_fingerprint: str


class CompletionFormat:
    """The wire format of the completions endpoint."""

    endpoint = "completions"

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask:
        """Raises ValidationError, UnknownModelError."""
        state = self._state
        request = decode.decode_completion(body)
        state.check_model(request.model)
        timeout_s = exchange.timeout_s(state.settings.request_timeout)
        is_stream = bool(request.stream)
        if is_stream and request.prompt_logprobs is not None:
            raise ValidationError("prompt_logprobs is not supported with stream.", param="prompt_logprobs")
        generation = GenerationRequest(
            request_id=state.new_id(),
            prompts=decode.completion_prompts(request),
            sampling=decode.completion_sampling(request),
            namespace=request.cache_salt or "",
            priority=request.priority or 0,
            arrival_s=arrival_s,
            deadline_s=arrival_s + timeout_s,
            add_special_tokens=request.add_special_tokens is not False,
            needs_prompt_text=bool(request.echo),
        )
        answer = CompletionAnswer(state, exchange.request_id, request)
        return Ask(generation, answer, is_stream, request.user or "", request.metadata or {})

    def error_body(self, error: ErrorInfo) -> bytes:
        return render.error_body(error)

    def error_event(self, error: ErrorInfo) -> bytes:
        return render.error_event(error)


class CompletionAnswer:
    """Renders one completion, streamed or whole. With echo, a choice's text begins with its prompt."""

    def __init__(self, state: ServerState, request_id: str, request: CompletionRequest) -> None:
        self._id = f"cmpl-{request_id}"
        self._created = int(state.now_s())
        self._model = request.model
        self._fingerprint = state.system_fingerprint
        self._echoes = bool(request.echo)
        self._scores_only = decode.scores_only(request)
        self._shows_logprobs = request.logprobs is not None
        self._shows_prompt_logprobs = request.prompt_logprobs is not None
        self._offsets: dict[int, int] = {}  # by choice: length of the text that was sent
        if request.stream:
            options = request.stream_options
            self._includes_usage = bool(options is not None and options.include_usage)
            self._head = b'data: {"id":%s,"object":"text_completion","created":%d,"model":%s,' % (
                render.encode(self._id), self._created, render.encode(request.model),
            ) + b'"system_fingerprint":%s,"choices":[' % render.encode(self._fingerprint)  # fmt: skip
            self._tail = b'],"usage":null}\n\n' if self._includes_usage else b"]}\n\n"
            self._text_head = self._head + b'{"index":0,"text":'
            self._text_tail = b',"logprobs":null,"finish_reason":null}' + self._tail
            self._is_plain = not self._echoes and not self._shows_logprobs

    def event(self, choice: Choice, delta: TextDelta) -> bytes:
        """The server-sent events for a delta; empty when it has nothing to say yet."""
        if self._is_plain and delta.finish_reason is None and choice.index == 0:
            return self._text_head + render.encode(delta.text) + self._text_tail if delta.text else b""
        is_first = choice.index not in self._offsets
        offset = self._offsets.setdefault(choice.index, 0)
        text, logprobs = self._shown(choice, delta.text, delta.logprobs or (), offset, with_prompt=is_first)
        self._offsets[choice.index] = offset + len(text)
        if not text and delta.finish_reason is None and not (logprobs and logprobs.tokens):
            return b""
        event = self._head + b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s' % (
            choice.index, render.encode(text), render.encode(logprobs), render.encode(delta.finish_reason),
        )  # fmt: skip
        if delta.finish_reason is not None and choice.stop_reason is not None:
            event += b',"stop_reason":' + render.encode(choice.stop_reason)
        return event + b"}" + self._tail

    def last_events(self, usage: Usage) -> bytes:
        if not self._includes_usage:
            return render.DONE
        body = render.encode(render.usage_body(self._shown_usage(usage)))
        return self._head + b'],"usage":' + body + b"}\n\n" + render.DONE

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        return render.encode(
            _Body(
                id=self._id,
                object="text_completion",
                created=self._created,
                model=self._model,
                choices=[self._choice_body(choice) for choice in choices],
                usage=render.usage_body(self._shown_usage(usage)),
                system_fingerprint=self._fingerprint,
            )
        )

    def _choice_body(self, choice: Choice) -> _Choice:
        text, logprobs = self._shown(choice, choice.text, choice.logprobs or (), 0, with_prompt=True)
        prompt_logprobs = render.prompt_logprobs(choice) if self._shows_prompt_logprobs else None
        return _Choice(choice.index, text, logprobs, choice.finish_reason, choice.stop_reason, prompt_logprobs)

    def _shown(
        self, choice: Choice, text: str, tokens: Sequence[TokenText], offset: int, *, with_prompt: bool
    ) -> tuple[str, render.CompletionLogprobs | None]:
        """Text and log-probabilities as the client sees them: with the echoed prompt, without an unasked token."""
        shown: list[TokenText | None] = [] if self._scores_only else list(tokens)
        if self._scores_only:
            text = ""
        first_text = ""
        if self._echoes and with_prompt:
            prompt_text = choice.sequenced.prompt_text
            text = prompt_text + text
            if self._shows_logprobs:
                prompt_tokens = choice.state.prompt_logprobs() or []
                rest = sum(len(token.text) for token in prompt_tokens if token is not None)
                first_text = prompt_text[: max(0, len(prompt_text) - rest)]
                shown = [*prompt_tokens, *shown]
        if not self._shows_logprobs:
            return text, None
        return text, render.completion_logprobs(shown, offset, first_text)

    def _shown_usage(self, usage: Usage) -> Usage:
        if self._scores_only:
            return Usage(usage.num_prompt_tokens, usage.num_cached_tokens, 0)
        return usage
