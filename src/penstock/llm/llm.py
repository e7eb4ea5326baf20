"""LLM: a model in this process, for scripts and batches. The server's engine, without the server."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from penstock.assets import BUNDLED_MODEL
from penstock.base.errors import ConfigError
from penstock.config.defaults import machine_facts
from penstock.config.resolve import EngineOptions, resolve_engine_config
from penstock.engine.build import build_engine
from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.output import OutputState
from penstock.frontend.processor import Chat, Processor, Prompt
from penstock.frontend.text_files import TextFiles
from penstock.frontend.tokenizer import Tokenizer
from penstock.llm.results import Completion, Generation
from penstock.loader import read_model_config, resolve
from penstock.messages import EngineReady, EngineRequest, FinishReason, RequestOutput, SamplingParams

Conversation = Sequence[Mapping[str, Any]]

# Requests handed to the engine beyond those that run: enough that it never waits, few enough that memory stays flat.
FEED_AHEAD = 2


class LLM:
    """A loaded model.

        with LLM("path/or/hub-id") as llm:
            for generation in llm.generate(["Once upon a time"], SamplingParams(max_tokens=50)):
                print(generation.outputs[0].text)

    model: a local directory or a hub id; empty for the bundled demonstration model. options: the fields of
    EngineOptions, which are the server's settings of the same names (dtype, max_model_len, max_num_seqs, ...).
    Calls from several threads take turns.

    Raises: CheckpointError, ConfigError or MemoryPlanError when the model cannot be served here.
    """

    def __init__(
        self,
        model: str = "",
        *,
        revision: str | None = None,
        on_progress: Callable[[str, float], None] | None = None,
        **options: Any,
    ) -> None:
        unknown = sorted(set(options) - set(EngineOptions.__struct_fields__))
        if unknown:
            raise ConfigError(
                f"LLM has no option {unknown[0]!r}.",
                remedy=f"Options: {', '.join(EngineOptions.__struct_fields__)}.",
                param=unknown[0],
            )
        path = resolve(model, revision) if model else BUNDLED_MODEL
        config = resolve_engine_config(
            str(path), read_model_config(path), EngineOptions(**options), machine_facts(), target_step_s=0.0
        )
        files = TextFiles.read(path)
        chat_template = ChatTemplate.from_files(files)
        tokenizer = Tokenizer.from_files(files)
        self._core, self.ready = build_engine(config, on_progress or _ignore_progress)
        self._processor = Processor(tokenizer, chat_template, self.ready.max_model_len, self.ready.vocab_size)
        self._lock = threading.Lock()
        self._ids = itertools.count()

    ready: EngineReady

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the engine's thread; the model's memory goes with the object."""
        self._core.close()
        self._processor.close()

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        parse_control_tokens: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """Continues prompts: text, or token ids. One prompt or many; the results are in their order.

        sampling_params: one for all, or one each. parse_control_tokens: control tokens written out in a text become
        control tokens; only for text that no user had a hand in. on_progress(prompts done, prompts in all).
        Raises ValidationError or ContextOverflowError before anything runs, naming the field.
        """
        return self._generate(
            [self._prompt(prompt, parse_control_tokens) for prompt in _as_prompts(prompts)],
            sampling_params,
            on_progress,
        )

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """Answers conversations, rendered by the model's chat template. One conversation or many.

        Raises ValidationError (also for a model without a template) or ContextOverflowError before anything runs.
        """
        chats = [
            Chat(conversation, tools, variables=template_variables or {})
            for conversation in _as_conversations(conversations)
        ]
        return self._generate([self._processor.chat_prompt(chat) for chat in chats], sampling_params, on_progress)

    def _prompt(self, prompt: str | Sequence[int], parse_control_tokens: bool) -> Prompt:
        if isinstance(prompt, str):
            return self._processor.text_prompt(prompt, parse_control_tokens=parse_control_tokens)
        return self._processor.token_prompt(prompt)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> list[Generation]:
        parameters = _one_each(sampling_params, len(prompts))
        jobs: list[_Job] = []
        generations: list[Generation] = []
        for prompt, sampling in zip(prompts, parameters, strict=True):
            generation = Generation(prompt.text, prompt.token_ids, [])
            generations.append(generation)
            requests = self._processor.engine_requests(
                f"llm-{next(self._ids)}", prompt, sampling, arrival_s=time.monotonic()
            )
            for index, request in enumerate(requests):
                completion = Completion(index)
                generation.outputs.append(completion)
                jobs.append(_Job(request, self._processor.output_state(prompt, sampling), generation, completion))
        with self._lock:
            self._run(jobs, _Progress(len(generations), on_progress))
        return generations

    def _run(self, jobs: Sequence[_Job], progress: _Progress) -> None:
        """Feeds the engine and steps it until every job has its last output."""
        feed = iter(jobs)
        open_jobs: dict[str, _Job] = {}
        try:
            while self._feed(feed, open_jobs) or open_jobs:
                for output in self._core.step():
                    self._take(output, open_jobs, progress)
        except BaseException:  # an interrupt, say: nothing may go on running behind the caller's back
            self._core.abort(list(open_jobs))
            while self._core.has_work():
                self._core.step()
            raise

    def _feed(self, feed: Iterator[_Job], open_jobs: dict[str, _Job]) -> bool:
        """Tops up the engine; whether anything was added."""
        wanted = FEED_AHEAD * self.ready.max_num_seqs - len(open_jobs)
        added = list(itertools.islice(feed, max(wanted, 0)))
        for job in added:
            open_jobs[job.request.request_id] = job
            refusal = self._core.add(job.request)
            if refusal is not None:
                del open_jobs[job.request.request_id]
                job.take(refusal)
        return bool(added)

    def _take(self, output: RequestOutput, open_jobs: dict[str, _Job], progress: _Progress) -> None:
        job = open_jobs.get(output.request_id)
        if job is None:
            return  # the engine's last word on a sequence that a stop string had ended
        if job.take(output):
            self._core.abort([output.request_id], FinishReason.STOP)
        if job.completion.finish_reason is not None:
            del open_jobs[output.request_id]
            if all(completion.finish_reason is not None for completion in job.generation.outputs):
                progress.advance()


class _Job:
    """One sequence in the making."""

    __slots__ = ("completion", "generation", "request", "state")

    def __init__(
        self, request: EngineRequest, state: OutputState, generation: Generation, completion: Completion
    ) -> None:
        self.request = request
        self.state = state
        self.generation = generation
        self.completion = completion

    def take(self, output: RequestOutput) -> bool:
        """Adds an output; whether the engine must be told that a stop string ended the sequence."""
        text = self.state.process(output)
        self.completion.add(text)
        if text.prompt_logprobs is not None:
            self.generation.prompt_logprobs = text.prompt_logprobs
        if self.completion.index == 0 and text.finish_reason is not None:
            self.generation.num_cached_tokens = text.num_cached_tokens
        return text.must_abort


class _Progress:
    """Counts finished prompts for a caller who wants to know."""

    def __init__(self, num_prompts: int, on_progress: Callable[[int, int], None] | None) -> None:
        self._num_prompts = num_prompts
        self._num_done = 0
        self._on_progress = on_progress

    def advance(self) -> None:
        self._num_done += 1
        if self._on_progress is not None:
            self._on_progress(self._num_done, self._num_prompts)


def _ignore_progress(_phase: str, _fraction: float) -> None:
    pass


def _as_prompts(prompts: Any) -> list[str | Sequence[int]]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def _as_conversations(conversations: Any) -> list[Conversation]:
    if len(conversations) and isinstance(conversations[0], Mapping):
        return [conversations]
    return list(conversations)


def _one_each(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or SamplingParams()] * num_prompts
    if len(sampling_params) != num_prompts:
        raise ConfigError(
            f"{len(sampling_params)} sampling_params were given for {num_prompts} prompts.",
            remedy="Give one for all, or one each.",
            param="sampling_params",
        )
    return sampling_params
