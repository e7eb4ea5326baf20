"""POST /v1/completions: OpenAI's older text format in and out."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from penstock.base.errors import ValidationError
from penstock.frontend.output import LogprobEntry, TextOutput
from penstock.server.exchange import Exchange
from penstock.server.generate import Ask, Choice, Usage
from penstock.server.openai import decode, render
from penstock.server.openai.schema import CompletionRequest
from penstock.server.state import ServerState
from penstock.server.text import GenerationRequest, TextLayer


class _Choice(msgspec.Struct, omit_defaults=True):
    index: int
    text: str
    logprobs: render.CompletionLogprobs | None
    finish_reason: str
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[int, render.PromptLogprob] | None] | None = None
    warnings: list[render.WarningBody] | None = None
    token_ids: list[int] | None = None


class _Body(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[_Choice]
    usage: render.UsageBody
    system_fingerprint: str


class CompletionFormat(render.OpenAIErrors):
    """The wire format of the completions endpoint."""

    endpoint = "completions"

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask:
        """Raises ValidationError, UnknownModelError."""
        state = self._state
        request, ignored = decode.decode_completion(body, lenient=state.settings.lenient)
        state.check_model(request.model)
        state.check_priority(request.priority)
        timeout_s = exchange.timeout_s(state.settings.request_timeout)
        is_stream = bool(request.stream)
        if is_stream and request.prompt_logprobs is not None:
            raise ValidationError("prompt_logprobs is not supported with stream.", param="prompt_logprobs")
        generation = GenerationRequest(
            request_id=state.new_id(),
            prompts=decode.completion_sources(request),
            sampling=decode.completion_sampling(request),
            beams=decode.beams_of(request),
            namespace=request.cache_salt or "",
            priority=request.priority or 0,
            arrival_s=arrival_s,
            deadline_s=arrival_s + timeout_s,
            add_special_tokens=request.add_special_tokens is not False,
        )
        assert state.text is not None
        answer = CompletionAnswer(state, state.text, exchange.request_id, request, ignored)
        return Ask(generation, answer, is_stream, request.user or "", request.metadata or {})


class CompletionAnswer:
    """Renders one completion, streamed or whole. With echo, a choice's text begins with its prompt."""

    def __init__(
        self, state: ServerState, text: TextLayer, request_id: str, request: CompletionRequest, ignored: Sequence[str]
    ) -> None:
        self._warnings = render.ignored_warnings(ignored) or None
        self._text = text
        self._id = f"cmpl-{request_id}"
        self._created = int(state.now_s())
        self._model = request.model
        self._fingerprint = state.system_fingerprint
        self._echoes = bool(request.echo)
        self._scores_only = decode.scores_only(request)
        self._num_top = request.logprobs
        self._shows_ids = bool(request.return_token_ids)
        self._shows_prompt_logprobs = request.prompt_logprobs is not None
        self._started: set[int] = set()
        if request.stream:
            options = request.stream_options
            self._includes_usage = bool(options is not None and options.include_usage)
            self._head = b'data: {"id":%s,"object":"text_completion","created":%d,"model":%s,' % (
                render.encode(self._id), self._created, render.encode(request.model),
            ) + b'"system_fingerprint":%s,"choices":[' % render.encode(self._fingerprint)  # fmt: skip
            self._tail = b'],"usage":null}\n\n' if self._includes_usage else b"]}\n\n"
            self._text_head = self._head + b'{"index":0,"text":'
            self._text_tail = b',"logprobs":null,"finish_reason":null}' + self._tail
            self._is_plain = not self._echoes and self._num_top is None and not self._shows_ids

    def event(self, choice: Choice, delta: TextOutput) -> bytes:
        """The server-sent events for a delta; empty when it has nothing to say yet."""
        if self._is_plain and delta.finish_reason is None and choice.index == 0:
            return self._text_head + render.encode(delta.text) + self._text_tail if delta.text else b""
        is_first = choice.index not in self._started
        self._started.add(choice.index)
        text, logprobs = self._shown(choice, delta.text, delta.logprobs or (), with_prompt=is_first)
        token_ids = delta.token_ids if self._shows_ids else ()
        if not text and delta.finish_reason is None and not token_ids and not (logprobs and logprobs.tokens):
            return b""
        event = self._head + b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s' % (
            choice.index, render.encode(text), render.encode(logprobs), render.encode(delta.finish_reason),
        )  # fmt: skip
        if delta.finish_reason is not None and choice.stop_reason is not None:
            event += b',"stop_reason":' + render.encode(choice.stop_reason)
        if delta.finish_reason is not None and self._warnings:
            event += b',"warnings":' + render.encode(self._warnings)
        if self._shows_ids:
            event += b',"token_ids":' + render.encode(token_ids)
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
        text, logprobs = self._shown(choice, choice.text, choice.logprobs or (), with_prompt=True)
        prompt_logprobs = render.prompt_logprobs(choice.prompt_logprobs) if self._shows_prompt_logprobs else None
        token_ids = choice.token_ids if self._shows_ids else None
        return _Choice(
            choice.index,
            text,
            logprobs,
            choice.finish_reason,
            choice.stop_reason,
            prompt_logprobs,
            self._warnings,
            token_ids,
        )

    def _shown(
        self, choice: Choice, text: str, entries: Sequence[LogprobEntry], *, with_prompt: bool
    ) -> tuple[str, render.CompletionLogprobs | None]:
        """Text and log-probabilities as the client sees them: with the echoed prompt, without an unasked token."""
        if self._scores_only:
            text, entries = "", ()
        lists = render.CompletionLogprobs([], [], [], [])
        prompt_text = self._prompt_text(choice) if self._echoes else ""
        if self._num_top is not None:
            if self._echoes and with_prompt:
                self._add_prompt(lists, choice, len(prompt_text), self._num_top)
            render.add_logprobs(lists, entries, len(prompt_text), self._num_top)
        return (prompt_text if with_prompt else "") + text, lists if self._num_top is not None else None

    def _prompt_text(self, choice: Choice) -> str:
        """The prompt as it was given; as its tokens read where it was given in ids."""
        prompt = choice.sequenced.prompt
        return prompt.text if prompt.text is not None else self._text.decode(prompt.token_ids)

    def _add_prompt(self, lists: render.CompletionLogprobs, choice: Choice, num_chars: int, num_top: int) -> None:
        """The prompt's tokens. The first has no log-probability; one that is not in the text (BOS) shifts the rest."""
        token_ids = choice.sequenced.prompt.token_ids
        lists.tokens.append(self._text.decode(token_ids[:1]))
        lists.token_logprobs.append(None)
        lists.top_logprobs.append(None)
        lists.text_offset.append(0)
        entries = [entry for entry in choice.prompt_logprobs or () if entry is not None]
        render.add_logprobs(lists, entries, num_chars - len(self._text.decode(token_ids)), num_top)

    def _shown_usage(self, usage: Usage) -> Usage:
        if self._scores_only:
            return Usage(usage.num_prompt_tokens, usage.num_cached_tokens, 0)
        return usage
