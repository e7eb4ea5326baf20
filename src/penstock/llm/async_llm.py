"""AsyncLLM: a model in a process of its own, for asyncio programs. The server's engine, without HTTP."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Self

from penstock.base.errors import RequestFailedError, ValidationError
from penstock.frontend.beam_search import BeamSearch, BeamSearchParams, run_beam_search
from penstock.frontend.engine_client import EngineClient
from penstock.frontend.one_pass import Source, plan_scores, ranking, vector_of
from penstock.frontend.output import TextOutput
from penstock.frontend.processor import Chat, Processor, Prompt
from penstock.llm.arguments import Conversation, as_prompts
from penstock.llm.opening import open_checkpoint
from penstock.llm.results import Classification, Completion, Embedding, Generation, Ranked, classification, of_beam
from penstock.messages import EngineReady, EngineRequest, FinishReason, PoolingParams, SamplingParams, StartupProgress


class AsyncLLM:
    """A loaded model; any number of calls may be in progress at once, and the engine batches them.

        async with await AsyncLLM.start("path/or/hub-id") as llm:
            generation = await llm.generate("Once upon a time", SamplingParams(max_tokens=50))
            async for delta in llm.stream("Once upon a time"):
                print(delta.text, end="")

    Belongs to the event loop in which it was started. A call that is cancelled ends its requests in the engine.
    """

    def __init__(self, client: EngineClient, processor: Processor) -> None:
        """Use `start`."""
        self._client = client
        self._processor = processor
        self._ids = itertools.count()

    @classmethod
    async def start(
        cls,
        model: str = "",
        *,
        revision: str | None = None,
        on_progress: Callable[[str, float], None] | None = None,
        **options: Any,
    ) -> AsyncLLM:
        """Arguments and errors are those of LLM."""
        opened = await asyncio.to_thread(open_checkpoint, model, revision, options)

        def report(progress: StartupProgress) -> None:
            if on_progress is not None:
                on_progress(progress.phase, progress.fraction)

        client = await EngineClient.start(opened.config, report)
        processor = opened.processor(client.ready)
        vocabulary = await asyncio.to_thread(processor.tokenizer.vocabulary)
        client.send(vocabulary.of_size(client.ready.vocab_size))
        return cls(client, processor)

    @property
    def ready(self) -> EngineReady:
        return self._client.ready

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the engine and what it is working on."""
        await self._client.shutdown(0.0)
        self._processor.close()

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        parse_control_tokens: bool = False,
    ) -> Generation:
        """Continues a text or token ids. Raises ValidationError or ContextOverflowError."""
        return await self._generate(await self._prompt(prompt, parse_control_tokens), sampling_params)

    async def chat(
        self,
        conversation: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Answers a conversation, rendered by the model's chat template. Raises as `generate` does."""
        chat = Chat(conversation, tools, variables=template_variables or {})
        prompt = await self._processor.prepare_chat(chat)
        sampling = self._processor.constrained(sampling_params or SamplingParams(), prompt, chat)
        return await self._generate(prompt, sampling)

    async def stream(
        self, prompt: str | Sequence[int] | Chat, sampling_params: SamplingParams | None = None
    ) -> AsyncIterator[TextOutput]:
        """One continuation (of a text, token ids or a Chat) piece by piece; the last piece has a finish_reason."""
        sampling = sampling_params or SamplingParams()
        if sampling.n != 1:
            raise ValidationError("A stream has one sequence.", remedy="Start several.", param="n")
        source = prompt if not isinstance(prompt, Chat) else await self._processor.prepare_chat(prompt)
        made = source if isinstance(source, Prompt) else await self._prompt(source, parse_control_tokens=False)
        [request] = self._requests(made, sampling)
        async for text in self._texts(request, made, sampling):
            yield text

    async def beam_search(
        self,
        prompt: str | Sequence[int],
        params: BeamSearchParams,
        *,
        max_tokens: int = 64,
        ignore_eos: bool = False,
    ) -> Generation:
        """As LLM.beam_search, for one prompt."""
        made = await self._prompt(prompt, parse_control_tokens=False)
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos)
        search = BeamSearch(self._requests(made, sampling)[0], params)
        failed = await run_beam_search(self._client, search)
        if failed is not None:
            raise RequestFailedError(failed.error.message if failed.error else "The engine stopped.")
        beams = enumerate(search.results(params.width))
        outputs = [of_beam(index, beam, self._processor.output_state(made, sampling)) for index, beam in beams]
        return Generation(made.text, made.token_ids, outputs)

    async def embed(
        self,
        inputs: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
    ) -> list[Embedding]:
        """As LLM.embed."""
        params = PoolingParams(kind="embed", dimensions=dimensions, normalize=normalize)
        results = await self._one_pass(as_prompts(inputs), params, truncate=truncate)
        return [Embedding(vector_of(pooled).tolist(), num_tokens) for pooled, num_tokens in results]

    async def classify(
        self,
        inputs: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        raw: bool = False,
        truncate: bool = False,
    ) -> list[Classification]:
        """As LLM.classify."""
        params = PoolingParams(kind="classify", activate=not raw)
        results = await self._one_pass(as_prompts(inputs), params, truncate=truncate)
        return [classification(self.ready.labels, pooled, num_tokens) for pooled, num_tokens in results]

    async def score(
        self, first: str | Sequence[str], second: str | Sequence[str], *, raw: bool = False, truncate: bool = False
    ) -> list[float]:
        """As LLM.score."""
        firsts, seconds = ([texts] if isinstance(texts, str) else texts for texts in (first, second))
        plan = plan_scores(self._processor.tasks, firsts, seconds, activate=not raw)
        return plan.scores(
            [pooled for pooled, _ in await self._one_pass(plan.sources, plan.pooling, truncate=truncate)]
        )

    async def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None, truncate: bool = False
    ) -> list[Ranked]:
        """As LLM.rerank."""
        self._processor.tasks.check("rerank")
        scores = await self.score(query, documents, truncate=truncate)
        return [Ranked(index, scores[index], documents[index]) for index in ranking(scores, top_n)]

    async def _prompt(self, prompt: str | Sequence[int], parse_control_tokens: bool) -> Prompt:
        if isinstance(prompt, str):
            return await self._processor.prepare_text(prompt, parse_control_tokens=parse_control_tokens)
        return self._processor.token_prompt(prompt)

    def _requests(self, prompt: Prompt, sampling: SamplingParams) -> list[EngineRequest]:
        request_id = f"llm-{next(self._ids)}"
        return self._processor.engine_requests(request_id, prompt, sampling, arrival_s=time.monotonic())

    async def _generate(self, prompt: Prompt, sampling_params: SamplingParams | None) -> Generation:
        sampling = sampling_params or SamplingParams()
        generation = Generation(prompt.text, prompt.token_ids, [])
        collecting = []
        for index, request in enumerate(self._requests(prompt, sampling)):
            generation.outputs.append(Completion(index))
            collecting.append(self._collect(request, prompt, sampling, generation, index))
        async with asyncio.TaskGroup() as group:
            for one in collecting:
                group.create_task(one)
        return generation

    async def _collect(
        self, request: EngineRequest, prompt: Prompt, sampling: SamplingParams, generation: Generation, index: int
    ) -> None:
        async for text in self._texts(request, prompt, sampling):
            generation.outputs[index].add(text)
            if text.prompt_logprobs is not None:
                generation.prompt_logprobs = text.prompt_logprobs
            if index == 0 and text.finish_reason is not None:
                generation.num_cached_tokens = text.num_cached_tokens

    async def _texts(
        self, request: EngineRequest, prompt: Prompt, sampling: SamplingParams
    ) -> AsyncIterator[TextOutput]:
        """The outputs of a request as text. However the reader leaves, the engine does not go on behind its back."""
        state = self._processor.output_state(prompt, sampling)
        reason = FinishReason.ABORT
        try:
            async for output in self._client.submit(request):
                text = state.process(output)
                if text.must_abort:
                    reason = FinishReason.STOP
                yield text
                if text.finish_reason is not None:
                    return
        finally:
            self._client.abort([request.request_id], reason)  # nothing, where it has ended

    async def _one_pass(
        self, sources: Sequence[Source], pooling: PoolingParams, *, truncate: bool
    ) -> list[tuple[bytes, int]]:
        """What the engine gave for each source, and its tokens."""
        longest = self.ready.max_model_len if truncate else None
        prompts = await self._processor.prepare_one_pass(sources, longest)
        now = time.monotonic()
        requests = [
            self._processor.one_pass_request(f"llm-{next(self._ids)}", prompt, pooling, arrival_s=now)
            for prompt in prompts
        ]
        streams = [self._client.submit(request) for request in requests]
        results: list[tuple[bytes, int]] = []
        try:
            for stream, prompt in zip(streams, prompts, strict=True):
                output = await anext(stream)
                if output.pooled is None:
                    raise RequestFailedError(output.error.message if output.error else "The engine stopped.")
                results.append((output.pooled, len(prompt.token_ids)))
        finally:
            self._client.abort([request.request_id for request in requests])
        return results
