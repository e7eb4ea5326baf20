"""LLM: a model in this process, for scripts and batches. The server's engine, without the server."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from penstock._native import release_threads
from penstock.base.errors import ConfigError, RequestFailedError
from penstock.engine.build import build_engine
from penstock.frontend.beam_search import BeamSearch, BeamSearchParams
from penstock.frontend.one_pass import Source, plan_scores, ranking, vector_of
from penstock.frontend.output import OutputState
from penstock.frontend.processor import Chat, Prompt
from penstock.llm.arguments import Conversation, as_conversations, as_prompts
from penstock.llm.opening import open_checkpoint
from penstock.llm.results import Classification, Completion, Embedding, Generation, Ranked, classification, of_beam
from penstock.messages import (
    EngineReady,
    EngineRequest,
    ErrorInfo,
    FinishReason,
    PoolingParams,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

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
        opened = open_checkpoint(model, revision, options, target_step_s=0.0)
        self._core, self.ready = build_engine(opened.config, on_progress or _ignore_progress)
        self._processor = opened.processor(self.ready)
        # While OpenMP keeps the threads that loaded the model, it counts more threads than cores, and sends those of a
        # step to sleep between two calls: a tenth of a single stream's speed. A server has other uses for the cores.
        release_threads()
        self._lock = threading.Lock()
        self._ids = itertools.count()

    ready: EngineReady

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the engine's thread and a GPU's memory; a CPU's goes with the object."""
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
            [self._prompt(prompt, parse_control_tokens) for prompt in as_prompts(prompts)],
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
        processor = self._processor
        chats = [
            Chat(conversation, tools, variables=template_variables or {})
            for conversation in as_conversations(conversations)
        ]
        prompts = [processor.chat_prompt(chat) for chat in chats]
        parameters = _one_each(sampling_params, len(chats))
        constrained = [
            processor.constrained(sampling, prompt, chat)
            for sampling, prompt, chat in zip(parameters, prompts, chats, strict=True)
        ]
        return self._generate(prompts, constrained, on_progress)

    def beam_search(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        params: BeamSearchParams,
        *,
        max_tokens: int = 64,
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """The likeliest continuations of each prompt, `params.width` of them, best first. Raises as `generate` does.

        Raises RequestFailedError when the engine could not serve one of the steps.
        """
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos)
        made = [self._prompt(prompt, parse_control_tokens=False) for prompt in as_prompts(prompts)]
        searches: list[BeamSearch] = []
        for prompt in made:
            request_id, now = f"llm-{next(self._ids)}", time.monotonic()
            (request,) = self._processor.engine_requests(request_id, prompt, sampling, arrival_s=now)
            searches.append(BeamSearch(request, params))
        with self._lock:
            while any(steps := [[_LogprobsJob(one) for one in search.requests()] for search in searches]):
                jobs = [job for step in steps for job in step]
                self._run(jobs, _Progress(len(jobs), None))
                for search, step in zip(searches, steps, strict=True):
                    if step:
                        search.advance([job.logprobs() for job in step])
        generations: list[Generation] = []
        for prompt, search in zip(made, searches, strict=True):
            beams = enumerate(search.results(params.width))
            outputs = [of_beam(index, beam, self._processor.output_state(prompt, sampling)) for index, beam in beams]
            generations.append(Generation(prompt.text, prompt.token_ids, outputs))
        return generations

    def embed(
        self,
        inputs: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Embedding]:
        """Vectors of texts or token ids. One input or many; the results are in their order.

        dimensions: keep so many leading entries. normalize: to unit length; None: as the checkpoint says. truncate:
        cut inputs that are too long, instead of refusing them. on_progress(inputs done, inputs in all).
        Raises ValidationError or ContextOverflowError before anything runs, also for a model that has no vectors.
        """
        params = PoolingParams(kind="embed", dimensions=dimensions, normalize=normalize)
        jobs = self._one_pass(as_prompts(inputs), params, truncate=truncate, on_progress=on_progress)
        return [Embedding(vector_of(job.pooled).tolist(), job.num_prompt_tokens) for job in jobs]

    def classify(
        self,
        inputs: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        raw: bool = False,
        truncate: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Classification]:
        """Labels of texts or token ids, by a classifier. raw: logits instead of probabilities. Else as `embed`."""
        params = PoolingParams(kind="classify", activate=not raw)
        jobs = self._one_pass(as_prompts(inputs), params, truncate=truncate, on_progress=on_progress)
        return [classification(self.ready.labels, job.pooled, job.num_prompt_tokens) for job in jobs]

    def score(
        self, first: str | Sequence[str], second: str | Sequence[str], *, raw: bool = False, truncate: bool = False
    ) -> list[float]:
        """How well pairs of texts fit: a cross-encoder's scores, else the cosines of the texts' vectors.

        A single first text is scored with every second; lists of the same length are paired. raw: logits, of a
        cross-encoder. truncate: cut the (second) text where it is too long. Raises as `embed` does.
        """
        firsts, seconds = ([texts] if isinstance(texts, str) else texts for texts in (first, second))
        plan = plan_scores(self._processor.tasks, firsts, seconds, activate=not raw)
        jobs = self._one_pass(plan.sources, plan.pooling, truncate=truncate)
        return plan.scores([job.pooled for job in jobs])

    def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, truncate: bool = False
    ) -> list[Ranked]:
        """The documents by how well they fit the query, best first; at most top_n of them. Raises as `embed` does."""
        self._processor.tasks.check("rerank")
        scores = self.score(query, documents, truncate=truncate)
        return [Ranked(index, scores[index], documents[index]) for index in ranking(scores, top_n)]

    def _one_pass(
        self,
        sources: Sequence[Source],
        pooling: PoolingParams,
        *,
        truncate: bool,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[_OnePassJob]:
        """Raises RequestFailedError when the engine could not serve one of the inputs."""
        longest = self.ready.max_model_len if truncate else None
        jobs = [
            _OnePassJob(
                self._processor.one_pass_request(
                    f"llm-{next(self._ids)}",
                    self._processor.one_pass_prompt(source, longest),
                    pooling,
                    arrival_s=time.monotonic(),
                )
            )
            for source in sources
        ]
        with self._lock:
            self._run(jobs, _Progress(len(jobs), on_progress))
        for job in jobs:
            if job.error is not None:
                raise RequestFailedError(job.error.message)
        return jobs

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
        if any(job.request.sampling.grammar is not None for job in jobs) and not self._core.has_vocabulary:
            self._core.set_vocabulary(self._processor.tokenizer.vocabulary().of_size(self.ready.vocab_size))
        with self._lock:
            self._run(jobs, _Progress(len(generations), on_progress))
        return generations

    def _run(self, jobs: Sequence[_AnyJob], progress: _Progress) -> None:
        """Feeds the engine and steps it until every job has its last output."""
        feed = iter(jobs)
        open_jobs: dict[str, _AnyJob] = {}
        try:
            while self._feed(feed, open_jobs) or open_jobs:
                for output in self._core.step():
                    self._take(output, open_jobs, progress)
        except BaseException:  # an interrupt, say: nothing may go on running behind the caller's back
            self._core.abort(list(open_jobs))
            while self._core.has_work():
                self._core.step()
            raise

    def _feed(self, feed: Iterator[_AnyJob], open_jobs: dict[str, _AnyJob]) -> bool:
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

    def _take(self, output: RequestOutput, open_jobs: dict[str, _AnyJob], progress: _Progress) -> None:
        job = open_jobs.get(output.request_id)
        if job is None:
            return  # the engine's last word on a sequence that a stop string had ended
        if job.take(output):
            self._core.abort([output.request_id], FinishReason.STOP)
        if job.is_finished:
            del open_jobs[output.request_id]
            if job.is_prompt_finished:
                progress.advance()


class _LogprobsJob:
    """A step of a beam search."""

    __slots__ = ("is_finished", "output", "request")
    is_prompt_finished = True

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.output = RequestOutput(request.request_id)
        self.is_finished = False

    def take(self, output: RequestOutput) -> bool:
        """Takes the only output."""
        self.is_finished, self.output = True, output
        return False

    def logprobs(self) -> TokenLogprobs:
        if not self.output.logprobs:
            raise RequestFailedError(self.output.error.message if self.output.error else "The engine stopped.")
        return self.output.logprobs[0]


class _OnePassJob:
    """A vector in the making. pooled: what the engine gave."""

    __slots__ = ("error", "is_finished", "num_prompt_tokens", "pooled", "request")

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.pooled = b""
        self.error: ErrorInfo | None = None
        self.is_finished = False
        self.num_prompt_tokens = len(request.prompt_token_ids)

    @property
    def is_prompt_finished(self) -> bool:
        return self.is_finished

    def take(self, output: RequestOutput) -> bool:
        """Takes the only output."""
        self.is_finished, self.error = True, output.error
        if output.pooled is not None:
            self.pooled = output.pooled
        return False


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

    @property
    def is_finished(self) -> bool:
        return self.completion.finish_reason is not None

    @property
    def is_prompt_finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.generation.outputs)

    def take(self, output: RequestOutput) -> bool:
        """Adds an output; whether the engine must be told that a stop string ended the sequence."""
        text = self.state.process(output)
        self.completion.add(text)
        if text.prompt_logprobs is not None:
            self.generation.prompt_logprobs = text.prompt_logprobs
        if self.completion.index == 0 and text.finish_reason is not None:
            self.generation.num_cached_tokens = text.num_cached_tokens
        return text.must_abort


_AnyJob = _Job | _OnePassJob | _LogprobsJob


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
