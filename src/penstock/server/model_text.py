"""The text layer of a served checkpoint.

Owns: the Processor and its threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from penstock.base.errors import ValidationError
from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.fill_in_middle import Gap
from penstock.frontend.one_pass import GENERATES, ModelTasks, Pair, PooledState, Source
from penstock.frontend.processor import Chat, Processor, Prompt
from penstock.frontend.text_files import TextFiles
from penstock.frontend.tokenizer import Tokenizer
from penstock.messages import PoolingParams
from penstock.messages.bounds import MAX_ENTRIES
from penstock.server.model_facts import ModelFacts
from penstock.server.text import GenerationRequest, Sequenced


class TextParts:
    """What can be loaded of a checkpoint's text before its engine is ready. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        files = TextFiles.read(path)
        self.tokenizer = Tokenizer.from_files(files)
        self.vocabulary = self.tokenizer.vocabulary()
        self.chat_template = ChatTemplate.from_files(files)
        self.facts = ModelFacts.read(path, files.model_type)


class ModelText:
    """Prepares requests for one engine. max_model_len and vocab_size are the engine's."""

    def __init__(self, parts: TextParts, max_model_len: int, vocab_size: int, tasks: ModelTasks = GENERATES) -> None:
        self._processor = Processor(parts.tokenizer, parts.chat_template, max_model_len, vocab_size, tasks=tasks)
        self.style = self._processor.output_style
        self.tasks = self._processor.tasks

    async def prepare(self, request: GenerationRequest) -> list[Sequenced]:
        """Raises ValidationError, ContextOverflowError."""
        if request.pooling is not None:
            return await self._prepare_one_pass(request, request.pooling)
        self.tasks.check("generate")
        sampling, processor = request.sampling, self._processor
        if len(request.prompts) * sampling.n > MAX_ENTRIES["sequences"]:
            raise ValidationError(
                f"{len(request.prompts)} prompts with n = {sampling.n} exceed {MAX_ENTRIES['sequences']} sequences.",
                remedy="Send several requests.",
                param="n",
            )
        sequences: list[Sequenced] = []
        for index, source in enumerate(request.prompts):
            prompt = await self.prompt(source, add_special_tokens=request.add_special_tokens)
            chat = source if isinstance(source, Chat) else None
            constrained = processor.constrained(sampling, prompt, chat) if chat is not None else sampling
            engine_requests = processor.engine_requests(
                f"{request.request_id}-{index}",
                prompt,
                constrained,
                namespace=request.namespace,
                priority=request.priority,
                arrival_s=request.arrival_s,
                deadline_s=request.deadline_s,
            )
            sequences += [
                Sequenced(one, processor.output_state(prompt, constrained, chat), prompt) for one in engine_requests
            ]
        return sequences

    async def _prepare_one_pass(self, request: GenerationRequest, pooling: PoolingParams) -> list[Sequenced]:
        self.tasks.check(pooling.kind)
        longest = request.truncate_tokens if request.truncate_tokens != -1 else self._processor.max_model_len
        sources = [source for source in request.prompts if not isinstance(source, (Chat, Gap))]
        sequences: list[Sequenced] = []
        for index, prompt in enumerate(await self._processor.prepare_one_pass(sources, longest)):
            engine_request = self._processor.one_pass_request(
                f"{request.request_id}-{index}",
                prompt,
                pooling,
                namespace=request.namespace,
                priority=request.priority,
                arrival_s=request.arrival_s,
                deadline_s=request.deadline_s,
            )
            sequences.append(Sequenced(engine_request, PooledState(), prompt))
        return sequences

    async def prompt(self, source: Source | Chat | Gap, *, add_special_tokens: bool = True) -> Prompt:
        """Raises ValidationError, ContextOverflowError."""
        if isinstance(source, str):
            return await self._processor.prepare_text(source, add_special_tokens=add_special_tokens)
        if isinstance(source, Chat):
            return await self._processor.prepare_chat(source)
        if isinstance(source, Gap):
            return await self._processor.prepare_gap(source, add_special_tokens=add_special_tokens)
        assert not isinstance(source, Pair), "only one-pass tasks read pairs"
        return self._processor.token_prompt(source)

    def template(self) -> str:
        return self._processor.chat_template.sources.get("default", "")

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [self._processor.tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._processor.tokenizer.decode(token_ids, skip_special_tokens=False)

    def close(self) -> None:
        self._processor.close()
