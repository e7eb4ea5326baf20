"""The one path of every generating request, whatever its protocol: read, decode, prepare, submit, answer, record.

A wire format plugs in as a `WireFormat`; it renders, and decides nothing else.
Owns: nothing; a request's state lives in its call.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from starlette.types import Receive, Scope, Send

from penstock.base.errors import DrainingError, PenstockError
from penstock.frontend.beam_search import BeamSearchParams
from penstock.frontend.output import LogprobEntry, TextOutput
from penstock.frontend.parsers.parts import CallEnd, MessagePart, ParseWarning, Part, merge_parts
from penstock.messages import ErrorInfo, FinishReason, GrammarKind, RequestOutput
from penstock.observability.metrics import ServerMetrics
from penstock.observability.usage import UsageRecord
from penstock.server.beam_search import BeamSearchFailedError, search_beams
from penstock.server.exchange import ClientGoneError, Exchange, choose_request_id
from penstock.server.inner_call import PRIORITY_KEY
from penstock.server.recording import record_request
from penstock.server.state import CutOffError, Engine, OpenRequest, OutputStream, ServerState
from penstock.server.text import GenerationRequest, Sequenced

logger = logging.getLogger(__name__)

# How a sequence ended, where it ended by itself and holds calls; else it is a FinishReason's value.
TOOL_CALLS: Final = "tool_calls"
# After a stop string the answer is out; the engine's own last word, with the timings, follows within a step.
LAST_WORD_S = 5.0


@dataclass(slots=True)
class Usage:
    """Token counts of a whole request."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0


@dataclass(slots=True)
class Choice:
    """One sequence and, when the answer is not streamed, everything it gave."""

    index: int
    sequenced: Sequenced
    stream: OutputStream
    is_first_of_prompt: bool
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    parts: list[Part] | None = None  # what a parser made of the text, where there is one
    num_calls: int = 0
    warnings: list[ParseWarning] = field(default_factory=list)
    logprobs: list[LogprobEntry] | None = None
    prompt_logprobs: list[LogprobEntry | None] | None = None
    finish_reason: str = ""
    stop_reason: str | int | None = None
    pooled: bytes = b""  # of a one-pass request: little-endian float32
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    scheduled_s: float = 0.0
    num_preemptions: int = 0
    is_over: bool = False  # the engine has said its last word

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def message(self) -> list[MessagePart]:
        """The whole answer in order: content, reasoning, calls."""
        if self.parts is None:
            return [text] if (text := self.text) else []
        return [part for part in merge_parts(self.parts) if not isinstance(part, ParseWarning)]


class Answer(Protocol):
    """Renders one request's answer. `outcome`: how the first choice ended, in the format's words."""

    def event(self, choice: Choice, delta: TextOutput) -> bytes: ...

    def last_events(self, usage: Usage) -> bytes: ...

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes: ...


@dataclass(slots=True)
class Ask:
    """A decoded request: what to generate and who renders it."""

    generation: GenerationRequest
    answer: Answer
    is_stream: bool
    user: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


class WireFormat(Protocol):
    """One protocol's endpoint."""

    endpoint: str

    def decode(self, body: bytes, exchange: Exchange, arrival_s: float) -> Ask | bytes:
        """What to generate, or the whole answer where that is nothing. Raises ValidationError, UnknownModelError."""
        ...

    def error_body(self, error: ErrorInfo) -> bytes: ...

    def error_event(self, error: ErrorInfo) -> bytes: ...


class GenerationFailedError(PenstockError):
    """A sequence ended with an error of the engine."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message, param=info.param)
        self.info = info


class GenerationEndpoint:
    """An ASGI application that serves one WireFormat."""

    def __init__(self, state: ServerState, wire: WireFormat) -> None:
        self._state = state
        self._wire = wire

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrival_s = time.monotonic()
        state = self._state
        exchange = Exchange(scope, receive, send, "")
        exchange.request_id = choose_request_id(exchange.headers.get(b"x-request-id"), state.new_id())
        record = UsageRecord(request_id=exchange.request_id, endpoint=self._wire.endpoint, model=state.model_names[0])
        opened = state.open_request(exchange)
        run = _Run(state, self._wire, exchange, record, opened)
        try:
            await run.serve(arrival_s)
        except asyncio.CancelledError:
            await run.fail(opened.cut or DrainingError("The server shut down before the answer was complete."))
            if opened.cut is None:
                raise
        except Exception as error:
            if not isinstance(error, PenstockError):
                logger.exception("request %s failed inside the server", exchange.request_id)
            await run.fail(error)
        finally:
            exchange.close()
            state.close_request(opened)
            record.duration_s = time.monotonic() - arrival_s
            state.usage.close(record)
            run.record_traffic()


class _Run:
    """One request on its way. `choices` are submitted; whatever ends the run, none of them keeps running."""

    def __init__(
        self, state: ServerState, wire: WireFormat, exchange: Exchange, record: UsageRecord, opened: OpenRequest
    ) -> None:
        self._state = state
        self._wire = wire
        self._exchange = exchange
        self._record = record
        self._opened = opened
        self._engine: Engine | None = None
        self._choices: list[Choice] = []
        self._searching: asyncio.Future[list[RequestOutput]] | None = None
        self._is_gone = False
        self._body = b""  # kept only while contents are recorded

    async def serve(self, arrival_s: float) -> None:
        exchange, record = self._exchange, self._record
        engine, text = self._state.parts()
        self._engine = engine
        body = await exchange.read_body()
        exchange.watch_disconnect(self._on_disconnect)
        ask = self._wire.decode(body, exchange, arrival_s)
        if isinstance(ask, bytes):
            await exchange.respond(200, ask)
            record.outcome = "stop"
            return
        if self._state.recorder is not None and self._state.recorder.has_contents:
            self._body = body
        record.is_stream, record.user, record.metadata = ask.is_stream, ask.user, ask.metadata
        generation = ask.generation
        if PRIORITY_KEY in exchange.scope:
            generation = dataclasses.replace(generation, priority=exchange.scope[PRIORITY_KEY])
        self._opened.deadline_s = generation.deadline_s
        sequences = await text.prepare(generation)
        if self._is_gone:
            raise ClientGoneError("The client left.")
        record.num_choices = len(sequences)
        if generation.beams is not None:
            await self._search(engine, sequences, generation.sampling.n, generation.beams)
        else:
            self._submit(engine, sequences, generation.sampling.n)
        try:
            if generation.beams is not None:
                await exchange.respond(200, ask.answer.body(self._choices, self._usage()))
            elif ask.is_stream:
                await self._stream(ask.answer)
            else:
                await self._collect(ask.answer)
            record.outcome = self._choices[0].finish_reason
            await self._hear_last_words()
        finally:
            self._stop(FinishReason.ABORT)
            self._fill_record(arrival_s)

    def record_traffic(self) -> None:
        """Writes what a replay needs to know of this request; one that never reached the engine brings no load."""
        recorder = self._state.recorder
        if recorder is not None and self._choices:
            choice, record = self._choices[0], self._record
            requester = self._exchange.headers.get(b"authorization", b"").decode(errors="replace") or record.user
            record_request(recorder, record, choice.sequenced.request, choice.token_ids, requester, self._body)

    async def fail(self, error: Exception) -> None:
        """Tells the client, as far as it can still be told, and the record."""
        record, exchange = self._record, self._exchange
        info = error.info if isinstance(error, GenerationFailedError) else ErrorInfo.of(error)
        if self._is_gone or isinstance(error, ClientGoneError):
            record.outcome, record.status = "cancelled", ClientGoneError.status
            return
        record.outcome = "refused" if info.status < 500 else "error"
        record.error_code, record.status = info.code, info.status
        if exchange.is_started:
            if not isinstance(error, CutOffError):  # who does not read cannot be told; the connection is closed
                await exchange.end(self._wire.error_event(info))
            return
        headers = []
        if info.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, round(info.retry_after_s))))
        elif info.status == DrainingError.status:
            headers.append((b"retry-after", b"1"))
        if info.status in (408, 413):
            headers.append((b"connection", b"close"))  # the rest of the body was not read
        await exchange.respond(info.status, self._wire.error_body(info), headers=headers)

    def _on_disconnect(self) -> None:
        self._is_gone = True
        if self._searching is not None:
            self._searching.cancel()
        self._stop(FinishReason.ABORT)

    def _stop(self, reason: FinishReason) -> None:
        open_ids = [choice.sequenced.request.request_id for choice in self._choices if not choice.is_over]
        if open_ids and self._engine is not None:
            self._engine.abort(open_ids, reason)

    def _submit(self, engine: Engine, sequences: Sequence[Sequenced], n: int) -> None:
        for index, sequenced in enumerate(sequences):
            stream = engine.submit(sequenced.request)
            self._choices.append(Choice(index, sequenced, stream, is_first_of_prompt=index % n == 0))

    async def _search(self, engine: Engine, sequences: Sequence[Sequenced], n: int, params: BeamSearchParams) -> None:
        """Finished choices by beam search, which ends where its client leaves."""
        self._searching = asyncio.ensure_future(search_beams(engine, sequences, n, params))
        try:
            outputs = await self._searching
        except BeamSearchFailedError as error:
            raise GenerationFailedError(error.info) from None
        except asyncio.CancelledError:
            if self._is_gone:
                raise ClientGoneError("The client left.") from None
            raise
        for index, (sequenced, output) in enumerate(zip(sequences, outputs, strict=True)):
            choice = Choice(index, sequenced, _Ended(), is_first_of_prompt=index % n == 0, is_over=True)
            self._choices.append(choice)
            self._note(choice, output, self._state.metrics)
            self._keep(choice, self._to_text(choice, output))

    async def _stream(self, answer: Answer) -> None:
        choices, exchange = self._choices, self._exchange
        if len(choices) == 1:
            await self._stream_choice(choices[0], answer, None)
        else:
            await _all([self._stream_choice(choice, answer, lock) for lock in (asyncio.Lock(),) for choice in choices])
        await exchange.end(answer.last_events(self._usage()))

    async def _stream_choice(self, choice: Choice, answer: Answer, lock: asyncio.Lock | None) -> None:
        write, metrics = self._exchange.write, self._state.metrics
        async for output in choice.stream:
            self._note(choice, output, metrics)
            delta = self._to_text(choice, output)
            events = answer.event(choice, delta)
            if events:
                if lock is None:
                    await write(events)
                else:
                    async with lock:  # one writer at a time: the headers must be out before any second event
                        await write(events)
            if delta.finish_reason is not None:
                return

    async def _collect(self, answer: Answer) -> None:
        choices = self._choices
        if len(choices) == 1:
            await self._collect_choice(choices[0])
        else:
            await _all([self._collect_choice(choice) for choice in choices])
        await self._exchange.respond(200, answer.body(choices, self._usage()))

    async def _collect_choice(self, choice: Choice) -> None:
        """Reads a choice to its end. Its text is made at once, unless a stop string may end it before."""
        metrics, is_watched = self._state.metrics, bool(choice.sequenced.request.sampling.stop)
        held: RequestOutput | None = None
        async for output in choice.stream:
            self._note(choice, output, metrics)
            held = output if held is None else _appended(held, output)
            if not is_watched and output.finish_reason is None:
                continue
            delta = self._to_text(choice, held)
            held = None
            self._keep(choice, delta)
            if delta.finish_reason is not None:
                return

    def _keep(self, choice: Choice, delta: TextOutput) -> None:
        """For an answer that is sent whole."""
        choice.pieces.append(delta.text)
        if delta.parts is not None:
            choice.parts = [*(choice.parts or ()), *delta.parts]
        if delta.logprobs is not None:
            choice.logprobs = [*(choice.logprobs or ()), *delta.logprobs]

    def _note(self, choice: Choice, output: RequestOutput, metrics: ServerMetrics) -> None:
        """Takes the times and the count of an output. Raises GenerationFailedError when it ended the sequence badly."""
        num_tokens = len(output.token_ids)
        if num_tokens:
            now_s = time.monotonic()
            if choice.first_token_s:
                metrics.inter_token_latency.observe((now_s - choice.last_token_s) / num_tokens, num_tokens)
            else:
                choice.first_token_s = now_s
                metrics.time_to_first_token.observe(now_s - choice.sequenced.request.arrival_s)
            choice.last_token_s = now_s
            choice.num_output_tokens += num_tokens
        if output.finish_reason is not None:
            self._take_last(choice, output)

    def _to_text(self, choice: Choice, output: RequestOutput) -> TextOutput:
        """The text of an output; tells the engine when a stop string in it ended the sequence."""
        delta = choice.sequenced.state.process(output)
        choice.num_output_tokens = delta.num_output_tokens
        choice.token_ids += delta.token_ids
        if delta.prompt_logprobs is not None:
            choice.prompt_logprobs = delta.prompt_logprobs
        if delta.pooled is not None:
            choice.pooled = delta.pooled
        if delta.parts:
            choice.num_calls += sum(isinstance(part, CallEnd) and part.is_complete for part in delta.parts)
            choice.warnings += [part for part in delta.parts if isinstance(part, ParseWarning)]
        if delta.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = delta.finish_reason.value, delta.stop_reason
            grammar = choice.sequenced.request.sampling.grammar
            if grammar is not None and grammar.kind is not GrammarKind.TEXT and choice.finish_reason == "length":
                choice.warnings.append(ParseWarning("unfinished_output", grammar.param or grammar.kind.value))
            if choice.num_calls and choice.finish_reason == "stop":
                choice.finish_reason = TOOL_CALLS
            if delta.must_abort and not choice.is_over:
                assert self._engine is not None
                self._engine.abort([choice.sequenced.request.request_id], FinishReason.STOP)
        return delta

    def _take_last(self, choice: Choice, output: RequestOutput) -> None:
        choice.is_over = True
        choice.num_cached_tokens = output.num_cached_tokens
        if output.timings is not None:
            choice.scheduled_s = output.timings.scheduled_s
            choice.num_preemptions = output.timings.num_preemptions
        if choice.finish_reason:
            return  # a stop string ended the answer before; this is only the engine's last word
        match output.finish_reason:
            case FinishReason.ERROR:
                assert output.error is not None
                raise GenerationFailedError(output.error)
            case FinishReason.TIMEOUT:
                raise GenerationFailedError(ErrorInfo("deadline_exceeded", 504, "The request's time was over."))
            case FinishReason.ABORT:
                if self._is_gone:
                    raise ClientGoneError("The client left.")
                raise DrainingError("The server shut down before the answer was complete.")

    async def _hear_last_words(self) -> None:
        """Reads the streams that a stop string cut to their end, for the timings. The client already has its answer."""
        waiting = [choice for choice in self._choices if not choice.is_over]
        if not waiting:
            return
        try:
            async with asyncio.timeout(LAST_WORD_S):
                for choice in waiting:
                    async for output in choice.stream:
                        if output.finish_reason is not None:
                            self._take_last(choice, output)
        except TimeoutError:
            logger.warning("request %s: the engine did not confirm its end", self._record.request_id)

    def _usage(self) -> Usage:
        usage = Usage()
        for choice in self._choices:
            usage.num_output_tokens += choice.num_output_tokens
            if choice.is_first_of_prompt:
                usage.num_prompt_tokens += len(choice.sequenced.request.prompt_token_ids)
                usage.num_cached_tokens += choice.num_cached_tokens
        return usage

    def _fill_record(self, arrival_s: float) -> None:
        record, usage = self._record, self._usage()
        record.num_prompt_tokens = usage.num_prompt_tokens
        record.num_cached_tokens = usage.num_cached_tokens
        record.num_output_tokens = usage.num_output_tokens
        record.num_preemptions = sum(choice.num_preemptions for choice in self._choices)
        first_token_s = [choice.first_token_s for choice in self._choices if choice.first_token_s]
        scheduled_s = [choice.scheduled_s for choice in self._choices if choice.scheduled_s]
        if first_token_s:
            record.time_to_first_token_s = min(first_token_s) - arrival_s
        if scheduled_s:
            record.queue_s = min(scheduled_s) - arrival_s


def _appended(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """`second` with what `first` holds before it. The lists of `first` are reused: appending stays linear."""
    first.token_ids.extend(second.token_ids)
    second.token_ids = first.token_ids
    if first.logprobs is not None:
        first.logprobs.extend(second.logprobs or ())
        second.logprobs = first.logprobs
    if first.prompt_logprobs is not None:
        second.prompt_logprobs = first.prompt_logprobs
    return second


class _Ended:
    """The stream of a choice that came whole."""

    def __aiter__(self) -> _Ended:
        return self

    async def __anext__(self) -> RequestOutput:
        raise StopAsyncIteration


async def _all(coroutines: Sequence[Coroutine[Any, Any, object]]) -> None:
    """Runs coroutines side by side; the first failure cancels the others and is raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
