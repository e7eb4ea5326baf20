"""A deterministic engine and text layer, and a real uvicorn around them.

Every character is a token whose id is its code point. A chat prompt is its messages joined by newlines; the engine
answers with `REPLY` and then the last line of the prompt, one token a step, and ends with an end-of-text token.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from penstock.base.errors import ContextOverflowError, DrainingError, PenstockError, ValidationError
from penstock.config.settings import Settings
from penstock.frontend.engine_client import RequestStream
from penstock.frontend.fill_in_middle import Gap
from penstock.frontend.one_pass import ModelTasks, Pair, PooledState
from penstock.frontend.output import LogprobEntry, TextOutput, TokenEntry
from penstock.frontend.parsers import hermes
from penstock.frontend.parsers.choose import OutputStyle
from penstock.frontend.parsers.parts import PartParser
from penstock.frontend.parsers.reasoning import ReasoningTags
from penstock.frontend.processor import Chat, Prompt
from penstock.messages import (
    EngineReady,
    EngineRequest,
    EngineStats,
    ErrorInfo,
    FinishReason,
    PoolingParams,
    RequestOutput,
    RequestTimings,
    TokenLogprobs,
)
from penstock.observability.metrics import ServerInfo
from penstock.observability.usage import UsageRecord
from penstock.server.app import build_app
from penstock.server.http_server import HttpServer
from penstock.server.listen import bind
from penstock.server.state import ServerState
from penstock.server.text import GenerationRequest, Sequenced

REPLY = "You said: "
EOS = 3
STYLE = OutputStyle(hermes.FORMAT, ReasoningTags("<think>", "</think>"))
MAX_MODEL_LEN = 4096
VOCAB_SIZE = 0x110000


class FakeEngine:
    """Steps whenever it has work. `hold` stops it between steps; `refusal` answers every new request."""

    def __init__(self) -> None:
        self.ready = EngineReady(
            max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, block_size=16, num_blocks=64, max_num_seqs=8,
            max_num_batched_tokens=64, dtype="float32", instruction_set="fake", phases=[("load weights", 0.1)],
        )  # fmt: skip
        self.stats = EngineStats(num_blocks=64, num_free_blocks=60, num_cached_blocks=2)
        self.pid = os.getpid()
        self.is_alive = True
        self.last_message_s = time.monotonic()
        self.hold = asyncio.Event()
        self.hold.set()
        self.refusal: PenstockError | None = None
        self.submitted: list[EngineRequest] = []
        self.aborted: list[tuple[str, FinishReason]] = []
        self.script: str | None = None  # what to answer instead
        self.num_tokens_of_step: Callable[[], int] = lambda: 1
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._streams: dict[str, RequestStream] = {}
        self._is_draining = False

    @property
    def num_open(self) -> int:
        return len(self._tasks)

    def seconds_since_progress(self, now: float) -> float:
        return now - self.last_message_s if self._tasks else 0.0

    def send(self, message: object) -> None:
        raise AssertionError("a fake engine is sent nothing but requests")

    def submit(self, request: EngineRequest) -> RequestStream:
        if self._is_draining:
            raise DrainingError("The server is shutting down.")
        assert request.request_id not in self._tasks
        self.submitted.append(request)
        stream = RequestStream(request.request_id, asyncio.get_running_loop())
        self._streams[request.request_id] = stream
        self._tasks[request.request_id] = asyncio.create_task(self._run(request, stream))
        self.stats.num_running = len(self._tasks)
        return stream

    def abort(self, request_ids: list[str], finish_reason: FinishReason = FinishReason.ABORT) -> None:
        for request_id in request_ids:
            task = self._tasks.pop(request_id, None)
            if task is not None:
                task.cancel()
                self.aborted.append((request_id, finish_reason))
                self._streams[request_id].push(
                    RequestOutput(request_id, finish_reason=finish_reason, timings=_timings())
                )
        self.stats.num_running = len(self._tasks)

    async def shutdown(self, drain_s: float) -> None:
        self._is_draining = True
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=drain_s)
        self.abort(list(self._tasks))
        self.is_alive = False

    async def _run(self, request: EngineRequest, stream: RequestStream) -> None:
        if request.pooling is not None and self.refusal is None:
            await self.hold.wait()
            values = fake_vector(request.prompt_token_ids, request.pooling)
            pooled = struct.pack(f"<{len(values)}f", *values)
            self._end(
                request, stream, RequestOutput(request.request_id, pooled=pooled, finish_reason=FinishReason.STOP)
            )
            return
        prompt_ids, sampling = request.prompt_token_ids, request.sampling
        if self.refusal is not None:
            self._end(request, stream, RequestOutput(request.request_id, error=ErrorInfo.of(self.refusal),
                                                     finish_reason=FinishReason.ERROR))  # fmt: skip
            return
        prompt = "".join(map(chr, prompt_ids))
        answer = REPLY + prompt.rsplit("\n", 1)[-1] if self.script is None else self.script
        tokens = [*map(ord, answer), EOS]
        if EOS not in request.stop_token_ids:
            tokens *= 1 + request.max_tokens // len(tokens)
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None:
            prompt_logprobs = [_logprob(token, sampling.prompt_logprobs) for token in prompt_ids[1:]]
        count = 0
        while True:
            await asyncio.sleep(0)
            await self.hold.wait()
            output = RequestOutput(request.request_id, prompt_logprobs=prompt_logprobs)
            prompt_logprobs = None
            for token in tokens[count : count + self.num_tokens_of_step()]:
                count += 1
                if token in request.stop_token_ids:
                    output.stop_token_id, output.finish_reason = token, FinishReason.STOP
                    break
                output.token_ids.append(token)
                if count >= request.max_tokens:
                    output.finish_reason = FinishReason.LENGTH
                    break
            if sampling.logprobs is not None:
                output.logprobs = [_logprob(token, sampling.logprobs) for token in output.token_ids]
            output.num_output_tokens = count
            if output.finish_reason is not None:
                self._end(request, stream, output)
                return
            self.last_message_s = time.monotonic()
            stream.push(output)

    def _end(self, request: EngineRequest, stream: RequestStream, output: RequestOutput) -> None:
        output.timings = _timings()
        output.num_prompt_tokens = len(request.prompt_token_ids)
        output.num_cached_tokens = 2 if output.error is None else 0
        self._tasks.pop(request.request_id, None)
        self.stats.num_running = len(self._tasks)
        stream.push(output)


def fake_vector(ids: list[int], params: PoolingParams | None = None) -> list[float]:
    """Two to four numbers that tell texts apart; of a classifier, a share for each of its labels."""
    if params is not None and params.kind == "classify":
        return [1 / len(ids)] if params.second_text_start else [0.25, 0.5 / len(ids), 0.75 - 0.5 / len(ids)]
    vector = [1.0, len(ids) / 2, ids[0] % 7.0, ids[-1] % 5.0]
    return vector[: params.dimensions] if params is not None else vector


def _timings() -> RequestTimings:
    now = time.monotonic()
    return RequestTimings(arrival_s=now, scheduled_s=now, first_token_s=now, finished_s=now, num_preemptions=1)


def _logprob(token_id: int, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, 1, [token_id + i for i in range(num_top)], [-0.5 - i for i in range(num_top)])


class FakeState:
    """Detokenizer of one sequence, with stop strings, and calls in Hermes style."""

    def __init__(self, request: EngineRequest, parser: PartParser | None) -> None:
        self._request = request
        self._parser = parser
        self._num_tokens = 0
        self._sent = 0
        self._text = ""

    def process(self, output: RequestOutput) -> TextOutput:
        result = self._to_text(output)
        if self._parser is not None:
            result.parts = self._parser.feed(result.text)
            if result.finish_reason is not None:
                result.parts += self._parser.finish()
        return result

    def _to_text(self, output: RequestOutput) -> TextOutput:
        result = TextOutput(
            "", output.token_ids, finish_reason=output.finish_reason, stop_token_id=output.stop_token_id
        )
        if output.prompt_logprobs is not None:
            entries = [_entry(logprobs, offset) for offset, logprobs in enumerate(output.prompt_logprobs, 1)]
            result.prompt_logprobs = [None, *entries]
        if output.logprobs is not None:
            result.logprobs = [_entry(logprobs, len(self._text) + i) for i, logprobs in enumerate(output.logprobs)]
        self._num_tokens += len(output.token_ids) + (output.stop_token_id is not None)
        result.num_output_tokens = self._num_tokens
        self._text += "".join(map(chr, output.token_ids))
        stops = self._request.sampling.stop
        for stop in stops:
            at = self._text.find(stop)
            if at >= 0:
                result.text = self._text[self._sent : at]
                result.must_abort = output.finish_reason is None
                result.finish_reason, result.stop_reason = FinishReason.STOP, stop
                return result
        held = max((len(stop) - 1 for stop in stops), default=0) if output.finish_reason is None else 0
        upto = max(self._sent, len(self._text) - held)
        result.text, self._sent = self._text[self._sent : upto], upto
        return result


def _entry(logprobs: TokenLogprobs, offset: int) -> LogprobEntry:
    def token(token_id: int, logprob: float) -> TokenEntry:
        return TokenEntry(token_id, chr(token_id), chr(token_id).encode(), logprob)

    top = [token(token_id, value) for token_id, value in zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)]
    return LogprobEntry(token(logprobs.token_id, logprobs.logprob), logprobs.rank, offset, top)


class FakeText:
    """The text layer: code points as tokens."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.tasks = ModelTasks(("generate", "embed", "score", "rerank"), 4)
        self.style = STYLE

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return list(map(chr, token_ids))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def template(self) -> str:
        return "{{ messages }}<tool_call><think>"

    async def prompt(self, source: str | list[int] | Chat | Gap, *, add_special_tokens: bool = True) -> Prompt:
        ids = _checked_ids(source)
        return Prompt(ids, self.decode(ids))

    async def prepare(self, request: GenerationRequest) -> list[Sequenced]:
        await asyncio.sleep(0)
        self.requests.append(request)
        if request.pooling is not None:
            return [self._pooled(request, request.pooling, i, source) for i, source in enumerate(request.prompts)]
        self.tasks.check("generate")
        sequences: list[Sequenced] = []
        for number, source in enumerate(request.prompts):
            ids = _checked_ids(source)
            max_tokens = request.sampling.max_tokens or MAX_MODEL_LEN - len(ids)
            if len(ids) + max_tokens > MAX_MODEL_LEN:
                raise ContextOverflowError(
                    f"{len(ids)} prompt tokens and {max_tokens} output tokens exceed the context of {MAX_MODEL_LEN}."
                )
            pins = ((9, 3600.0), (15, 300.0)) if isinstance(source, Chat) and source.breakpoints else ()
            prompt = Prompt(ids, None if isinstance(source, list) else self.decode(ids), pins=pins)
            for copy in range(request.sampling.n):
                engine_request = EngineRequest(
                    request_id=f"{request.request_id}-{number}-{copy}", prompt_token_ids=ids, sampling=request.sampling,
                    max_tokens=max_tokens, stop_token_ids=() if request.sampling.ignore_eos else (EOS,),
                    namespace=request.namespace, priority=request.priority, arrival_s=request.arrival_s,
                    deadline_s=request.deadline_s,
                )  # fmt: skip
                parser = self.style.parser(source.tools) if isinstance(source, Chat) else None
                sequences.append(Sequenced(engine_request, FakeState(engine_request, parser), prompt))
        return sequences

    def _pooled(self, request: GenerationRequest, pooling: PoolingParams, index: int, source: Any) -> Sequenced:
        self.tasks.check(pooling.kind)
        pooling.validate(self.tasks.embedding_size)
        first = list(map(ord, source.first)) if isinstance(source, Pair) else _prompt_ids(source)
        ids = first + list(map(ord, source.second)) if isinstance(source, Pair) else first
        limit = MAX_MODEL_LEN if request.truncate_tokens == -1 else request.truncate_tokens
        ids = ids[:limit]
        if not 0 < len(ids) <= MAX_MODEL_LEN or not all(0 <= token_id < VOCAB_SIZE for token_id in ids):
            raise ValidationError("The input does not fit.", param="input")
        if isinstance(source, Pair):
            pooling = msgspec.structs.replace(pooling, second_text_start=len(first))
        engine_request = EngineRequest(
            request_id=f"{request.request_id}-{index}", prompt_token_ids=ids, sampling=request.sampling, max_tokens=1,
            arrival_s=request.arrival_s, deadline_s=request.deadline_s, priority=request.priority, pooling=pooling,
        )  # fmt: skip
        return Sequenced(engine_request, PooledState(), Prompt(ids))


def _prompt_ids(source: str | list[int] | Chat | Gap) -> list[int]:
    if isinstance(source, list):
        return source
    if isinstance(source, str):
        return list(map(ord, source))
    if isinstance(source, Gap):
        return list(map(ord, f"{source.before}_{source.after}"))
    texts = [message["content"] if isinstance(message["content"], str) else "" for message in source.messages]
    return list(map(ord, "\n".join(texts)))


def _checked_ids(source: str | list[int] | Chat | Gap) -> list[int]:
    ids = _prompt_ids(source)
    if not ids:
        raise ValidationError("The prompt is empty.", param="prompt")
    if not all(0 <= token_id < VOCAB_SIZE for token_id in ids):
        raise ValidationError("The prompt holds a token outside the vocabulary.", param="prompt")
    return ids


@dataclass
class RunningServer:
    """A server on a real socket, and what stands behind it."""

    http: HttpServer
    state: ServerState
    engine: FakeEngine
    text: FakeText
    records: list[UsageRecord] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.http.url

    def client(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=10, verify=False, **options)

    async def settled(self) -> None:
        """Waits until no request is open and every record is written."""
        while self.state.num_open or self.engine.num_open:  # noqa: ASYNC110 - polls two objects
            await asyncio.sleep(0.005)

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - any condition
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def start_server(settings: Settings, *, is_serving: bool = True) -> AsyncIterator[RunningServer]:
    state = ServerState(settings, ["demo", "alias"], ServerInfo(version="0", model="demo"))
    state.system_fingerprint = "fp_fake"
    http = HttpServer(build_app(state), bind(settings), settings.client_timeout)
    running = RunningServer(http, state, FakeEngine(), FakeText())
    close = state.usage.close

    def record(entry: UsageRecord) -> None:
        running.records.append(entry)
        close(entry)

    state.usage.close = record  # type: ignore[method-assign]
    if is_serving:
        state.serve(running.engine, running.text)
    task = asyncio.create_task(http.serve())
    try:
        await http.wait_started()
        yield running
    finally:
        running.engine.hold.set()
        http.stop(at_once=True)
        await asyncio.wait_for(task, 10)
        state.close()
