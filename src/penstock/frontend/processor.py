"""From a validated request to engine requests, and from engine outputs to text: the one place that knows both sides.

Owns: the threads in which long prompts are tokenized, so that the event loop never waits for one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from penstock.base.errors import ContextOverflowError, ValidationError
from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.fill_in_middle import Gap, gap_token_ids
from penstock.frontend.one_pass import GENERATES, ModelTasks, Pair, Source
from penstock.frontend.output import OutputState
from penstock.frontend.parsers.choose import OutputStyle
from penstock.frontend.tokenizer import Tokenizer
from penstock.messages import (
    EngineRequest,
    GrammarKind,
    GrammarSpec,
    PoolingParams,
    SamplingParams,
    ToolCallSpec,
    ToolSpec,
)

# Up to here a prompt takes about a millisecond (0.25 microseconds a character): less than a turn over a thread costs
# when others run, and well below what anyone sees in a stream.
INLINE_CHARS: Final = 4096
_MASK_64: Final = (1 << 64) - 1

T = TypeVar("T")


@dataclass(frozen=True)
class CallRule:
    """What the calls of an answer must be like, to be enforced.

    is_required: the answer is calls and nothing else. only: of this tool. max_calls: None for any number.
    strict_tools: names of the tools whose schemas are enforced; with is_required all are.
    """

    is_required: bool = False
    only: str | None = None
    max_calls: int | None = None
    strict_tools: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, tools: Sequence[Mapping[str, Any]], *, is_required: bool = False, only: str | None = None,
        is_parallel: bool = True, has_grammar: bool = False,
    ) -> CallRule | None:  # fmt: skip
        """The rule of a request that shows these tools (in OpenAI's shape); None where nothing has to be enforced.

        only: the tool that must be called. has_grammar: what is no call has to obey a grammar.
        Raises ValidationError: there is no such tool.
        """
        functions = [tool["function"] for tool in tools]
        if only is not None and all(function["name"] != only for function in functions):
            raise ValidationError(f"tool_choice names {only[:200]!r}, which is not in tools.", param="tool_choice")
        if only is not None or is_required:
            return cls(is_required=True, only=only, max_calls=None if is_parallel and only is None else 1)
        strict = frozenset(function["name"] for function in functions if function.get("strict"))
        if not (strict or has_grammar) and is_parallel:
            return None
        return cls(max_calls=None if is_parallel else 1, strict_tools=strict)


@dataclass(frozen=True)
class Thinking:
    """What a request says about the model's reasoning. param: the field to name in a refusal.

    max_tokens: of the reasoning; then it is ended by force. effort: a word that the chat template must know.
    """

    max_tokens: int | None = None
    effort: str | None = None
    param: str = ""


@dataclass(frozen=True)
class Chat:
    """A conversation of plain JSON values, as in the OpenAI API.

    variables: further ones for the chat template. call_rule: None where the model may write what it likes.
    breakpoints: (leading messages, seconds): the prompt up to there is to stay cached so long; no messages means the
    tools and system messages.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    call_rule: CallRule | None = None
    thinking: Thinking = Thinking()
    breakpoints: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Prompt:
    """What goes into the engine. text: what the tokens were made from; None when they came as ids.

    opening: for a chat, what its template wrote behind the last text of a message.
    second_text_start: for a pair, position of the second text where the model tells the two apart, else 0.
    pins: (leading tokens, seconds): how long which part of it is to stay cached.
    """

    token_ids: list[int]
    text: str | None = None
    opening: str = ""
    second_text_start: int = 0
    pins: tuple[tuple[int, float], ...] = ()


class Processor:
    """Text in, text out, around an engine that knows token ids only."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        max_model_len: int,
        vocab_size: int,
        *,
        tasks: ModelTasks = GENERATES,
        num_threads: int = 2,
    ) -> None:
        """vocab_size: the model's, which may be larger than the tokenizer's. num_threads: for long prompts."""
        self.tasks = tasks
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.output_style = OutputStyle.of(chat_template)
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")

    def close(self) -> None:
        """Ends the threads. Prompts in the making are given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # Prompts

    def chat_prompt(self, chat: Chat) -> Prompt:
        """Raises ValidationError or ContextOverflowError."""
        messages = list(chat.messages)
        if self.chat_template and not self.chat_template.takes_argument_text(chat.tools):
            messages = [_with_argument_objects(message) for message in messages]
        variables = {**chat.variables, **self._effort(chat.thinking)}
        rendered = self.chat_template.render(
            messages,
            chat.tools,
            documents=chat.documents,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            variables=variables,
        )
        self._check_chars(rendered.text, "messages")
        opening = rendered.text[rendered.user_spans[-1][1] if rendered.user_spans else 0 :]
        token_ids = self.tokenizer.encode_prompt(rendered)
        pins = tuple(
            (self._num_shared(chat, messages[:num_messages], variables, token_ids), ttl_s)
            for num_messages, ttl_s in chat.breakpoints
        )
        return self._checked(Prompt(token_ids, rendered.text, opening, pins=pins), "messages")

    def _effort(self, thinking: Thinking) -> dict[str, str]:
        if thinking.effort is None:
            return {}
        if not any("reasoning_effort" in source for source in self.chat_template.sources.values()):
            raise ValidationError(
                f"{thinking.param}: this model's chat template knows no degrees of reasoning.",
                remedy="Leave it out.",
                param=thinking.param,
            )
        return {"reasoning_effort": thinking.effort}

    def _num_shared(
        self, chat: Chat, messages: list[Mapping[str, Any]], variables: Mapping[str, Any], token_ids: list[int]
    ) -> int:
        """How many tokens the prompt shares with that of its first messages: what a conversation that goes on otherwise
        from there shares with it too. Without messages: tools and system messages."""
        if not messages:
            heads = itertools.takewhile(lambda message: message["role"] == "system", chat.messages)
            messages = [*heads, {"role": "user", "content": ""}]
        try:
            rendered = self.chat_template.render(messages, chat.tools, add_generation_prompt=False, variables=variables)
        except ValidationError:
            return len(token_ids)  # a template that refuses part of a conversation: the whole prompt is kept
        shared = self.tokenizer.encode_prompt(rendered)
        differs = (at for at, (one, other) in enumerate(zip(shared, token_ids, strict=False)) if one != other)
        return next(differs, min(len(shared), len(token_ids)))

    def text_prompt(self, text: str, *, add_special_tokens: bool = True, parse_control_tokens: bool = False) -> Prompt:
        """A prompt that is no conversation. Control tokens written out in it stay text, unless they are to be parsed.

        Raises ValidationError or ContextOverflowError.
        """
        self._check_chars(text, "prompt")
        encode = self.tokenizer.encode if parse_control_tokens else self.tokenizer.encode_user
        return self._checked(Prompt(encode(text, add_special_tokens=add_special_tokens), text), "prompt")

    def gap_prompt(self, gap: Gap, *, add_special_tokens: bool = True) -> Prompt:
        """A text with a gap to fill. Raises ValidationError or ContextOverflowError."""
        self._check_chars(gap.before + gap.after, "prompt")
        return self._checked(
            Prompt(gap_token_ids(self.tokenizer, gap, add_special_tokens=add_special_tokens)), "prompt"
        )

    def token_prompt(self, token_ids: Sequence[int]) -> Prompt:
        """A prompt that comes as ids. Raises ValidationError or ContextOverflowError."""
        self._check_ids(token_ids, "prompt")
        return self._checked(Prompt(list(token_ids)), "prompt")

    def one_pass_prompt(self, source: Source, max_tokens: int | None = None) -> Prompt:
        """What a one-pass task reads: a text, token ids as they are, or a pair. Raises as `text_prompt` does.

        max_tokens: longer ones are cut to that many instead of refused, at most to the model's context.
        """
        longest = self.max_model_len if max_tokens is None else min(max_tokens, self.max_model_len)
        if isinstance(source, (str, Pair)):
            first, second = (source.first, source.second) if isinstance(source, Pair) else (source, None)
            if max_tokens is None:
                for text in (first, second or ""):
                    self._check_chars(text, "input")
            elif second is None:
                first = first[: longest * self.tokenizer.longest_token]
            else:
                second = second[: longest * self.tokenizer.longest_token]
            token_ids, start = self.tokenizer.encode_whole(first, second, None if max_tokens is None else longest)
            prompt = Prompt(token_ids, None if isinstance(source, Pair) else source, second_text_start=start)
        else:
            self._check_ids(source, "input")
            prompt = Prompt(list(source) if max_tokens is None else list(source[:longest]))
        num_tokens = len(prompt.token_ids)
        if not num_tokens:
            raise ValidationError("The input is empty.", remedy="Give at least one token.", param="input")
        if num_tokens > longest:
            raise ContextOverflowError(
                f"The input has {num_tokens} tokens; the model reads at most {longest}.",
                remedy="Shorten it, or ask for it to be cut.",
                param="input",
            )
        return prompt

    async def prepare_one_pass(self, sources: Sequence[Source], max_tokens: int | None = None) -> list[Prompt]:
        """`one_pass_prompt` of each, in a thread when they are long together."""
        num_chars = sum(len(one.first) + len(one.second) if isinstance(one, Pair) else len(one) for one in sources)
        return await self._run(lambda: [self.one_pass_prompt(source, max_tokens) for source in sources], num_chars)

    async def prepare_chat(self, chat: Chat) -> Prompt:
        """`chat_prompt`, in a thread when the conversation is long."""
        num_chars = sum(map(_num_chars, (chat.messages, chat.tools, chat.documents, chat.variables)))
        return await self._run(lambda: self.chat_prompt(chat), num_chars)

    async def prepare_text(
        self, text: str, *, add_special_tokens: bool = True, parse_control_tokens: bool = False
    ) -> Prompt:
        """`text_prompt`, in a thread when the text is long."""
        return await self._run(
            lambda: self.text_prompt(
                text, add_special_tokens=add_special_tokens, parse_control_tokens=parse_control_tokens
            ),
            len(text),
        )

    async def prepare_gap(self, gap: Gap, *, add_special_tokens: bool = True) -> Prompt:
        """`gap_prompt`, in a thread when the texts are long."""
        return await self._run(
            lambda: self.gap_prompt(gap, add_special_tokens=add_special_tokens), len(gap.before) + len(gap.after)
        )

    async def _run(self, prepare: Callable[[], T], num_chars: int) -> T:
        if num_chars <= INLINE_CHARS:
            return prepare()
        return await asyncio.get_running_loop().run_in_executor(self._threads, prepare)

    def _check_chars(self, text: str, param: str) -> None:
        """Refuses what cannot fit however it is tokenized, before any time goes into tokenizing it."""
        if len(text) > self.max_model_len:
            num_tokens = len(text) // self.tokenizer.longest_token
            if num_tokens >= self.max_model_len:
                raise ContextOverflowError(
                    f"The prompt has at least {num_tokens} tokens, the model's context {self.max_model_len}.",
                    remedy="Shorten the prompt.",
                    param=param,
                )

    def _check_ids(self, token_ids: Sequence[int], param: str) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValidationError(
                    f"The {param} holds token {token_id}, outside the vocabulary of {self.vocab_size}.", param=param
                )

    def _checked(self, prompt: Prompt, param: str) -> Prompt:
        num_tokens = len(prompt.token_ids)
        if not num_tokens:
            raise ValidationError("The prompt is empty.", remedy="Give at least one token.", param=param)
        if num_tokens >= self.max_model_len:
            raise ContextOverflowError(
                f"The prompt has {num_tokens} tokens, the model's context {self.max_model_len}: no room for an answer.",
                remedy="Shorten the prompt.",
                param=param,
            )
        return prompt

    # Engine requests

    def engine_requests(
        self,
        request_id: str,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        namespace: str = "",
        priority: int = 0,
        arrival_s: float = 0.0,
        deadline_s: float | None = None,
    ) -> list[EngineRequest]:
        """One request for each of the n choices, with ids `{request_id}-{index}`, all sharing the prompt.

        Raises ValidationError naming the field, or ContextOverflowError when the output asked for cannot fit.
        """
        self.tasks.check("generate")
        sampling.validate(self.vocab_size)
        num_prompt_tokens = len(prompt.token_ids)
        max_tokens = self._max_tokens(sampling, num_prompt_tokens)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        bad_words = sampling.bad_words_token_ids + self._bad_words(sampling.bad_words)
        breakers = sampling.dry_breaker_token_ids
        if sampling.dry_multiplier > 0.0:
            breakers += self.tokenizer.tokens_with(sampling.dry_sequence_breakers)
        eos = () if sampling.ignore_eos else self.tokenizer.eos_token_ids
        stop_token_ids = tuple(dict.fromkeys((*eos, *sampling.stop_token_ids)))
        return [
            EngineRequest(
                request_id=f"{request_id}-{index}",
                prompt_token_ids=prompt.token_ids,
                sampling=msgspec.structs.replace(
                    sampling,
                    n=1,
                    seed=derived_seed(seed, index),
                    max_tokens=max_tokens,
                    bad_words_token_ids=bad_words,
                    dry_breaker_token_ids=breakers,
                ),
                max_tokens=max_tokens,
                stop_token_ids=stop_token_ids,
                namespace=namespace,
                priority=priority,
                arrival_s=arrival_s,
                deadline_s=deadline_s,
                pins=prompt.pins,
            )
            for index in range(sampling.n)
        ]

    def one_pass_request(
        self,
        request_id: str,
        prompt: Prompt,
        pooling: PoolingParams,
        *,
        namespace: str = "",
        priority: int = 0,
        arrival_s: float = 0.0,
        deadline_s: float | None = None,
    ) -> EngineRequest:
        """Raises ValidationError (UnsupportedTaskError when the model does not do that) naming the field."""
        self.tasks.check(pooling.kind)
        pooling.validate(self.tasks.embedding_size)
        return EngineRequest(
            request_id=request_id,
            prompt_token_ids=prompt.token_ids,
            sampling=SamplingParams(),
            max_tokens=1,
            namespace=namespace,
            priority=priority,
            arrival_s=arrival_s,
            deadline_s=deadline_s,
            pooling=msgspec.structs.replace(pooling, second_text_start=prompt.second_text_start),
        )

    def constrained(self, sampling: SamplingParams, prompt: Prompt, chat: Chat) -> SamplingParams:
        """The parameters with the grammar that an answer to this conversation needs.

        Tool calls are written in the model's own form; where the template has opened the model's reasoning, that comes
        before whatever is asked for. Raises ValidationError when the model knows no calls.
        """
        grammar, style = sampling.grammar, self.output_style
        if chat.call_rule is not None:
            grammar = self._call_grammar(chat, chat.call_rule, grammar)
        if chat.thinking.max_tokens is not None:
            grammar = self._budgeted(chat.thinking, chat.thinking.max_tokens, prompt, grammar)
        elif grammar is None:
            return sampling
        elif style.reasoning is not None and style.reasoning.is_open_in(prompt.opening):
            grammar = msgspec.structs.replace(grammar, after=style.reasoning.close)
        return msgspec.structs.replace(sampling, grammar=grammar)

    def _budgeted(
        self, thinking: Thinking, max_tokens: int, prompt: Prompt, grammar: GrammarSpec | None
    ) -> GrammarSpec | None:
        """The grammar behind reasoning of at most max_tokens; as it was where the model does not reason."""
        if self.output_style.is_harmony:
            raise ValidationError("This model's reasoning cannot be ended by force.", param=thinking.param)
        tags = self.output_style.reasoning
        if tags is None:
            return grammar
        return msgspec.structs.replace(
            grammar or GrammarSpec(GrammarKind.TEXT, param=thinking.param),
            after=tags.close,
            after_tokens=max_tokens,
            opened_by="" if tags.is_open_in(prompt.opening) else tags.open,
        )

    def _call_grammar(self, chat: Chat, rule: CallRule, content: GrammarSpec | None) -> GrammarSpec:
        param = "tool_choice" if rule.is_required else "tools"
        form = self.output_style.call_form
        if form is None:
            raise ValidationError("The form in which this model writes tool calls cannot be enforced.", param=param)
        tools: list[ToolSpec] = []
        for tool in chat.tools or ():
            function = tool["function"]
            if rule.only in (None, function["name"]):
                is_enforced = rule.is_required or function["name"] in rule.strict_tools
                tools.append(ToolSpec(function["name"], function.get("parameters") if is_enforced else None))
        spec = ToolCallSpec(
            form,
            tools,
            # Text in which calls may stand is no alternative where the text itself has to obey a grammar.
            rule.is_required or content is not None,
            rule.max_calls,
            None if rule.is_required else content,
        )
        return spec.to_grammar(param)

    def output_state(self, prompt: Prompt, sampling: SamplingParams, chat: Chat | None = None) -> OutputState:
        """The text side of one choice of a request. chat: what the prompt was made from; its answer is taken apart."""
        if chat is None:
            return OutputState(self.tokenizer, sampling, prompt.token_ids)
        parser = self.output_style.parser(chat.tools, prompt.opening)
        markers = self.output_style.markers(with_tools=bool(chat.tools)) if parser is not None else frozenset()
        return OutputState(self.tokenizer, sampling, prompt.token_ids, parser, markers)

    def _max_tokens(self, sampling: SamplingParams, num_prompt_tokens: int) -> int:
        room = self.max_model_len - num_prompt_tokens
        if room <= 0 or (sampling.max_tokens or 0) > room:
            raise ContextOverflowError(
                f"The prompt has {num_prompt_tokens} tokens and max_tokens asks for {sampling.max_tokens or 1}, "
                f"together {num_prompt_tokens + (sampling.max_tokens or 1)}: the model's context is "
                f"{self.max_model_len}.",
                remedy=f"Ask for at most {room} tokens, or shorten the prompt." if room > 0 else "Shorten the prompt.",
                param="max_tokens",
            )
        if sampling.min_tokens > room:
            raise ValidationError(
                f"min_tokens ({sampling.min_tokens}) exceeds the {room} tokens left in the context.", param="min_tokens"
            )
        return room if sampling.max_tokens is None else sampling.max_tokens

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences of each word as it begins a text and, where that is another token, as it follows one."""
        sequences: list[tuple[int, ...]] = []
        for word in words:
            bare = word.lstrip()
            alone = tuple(self.tokenizer.encode(bare, add_special_tokens=False))
            after_space = tuple(self.tokenizer.encode(" " + bare, add_special_tokens=False))
            if not alone:
                raise ValidationError("bad_words has an entry without tokens.", param="bad_words")
            sequences.append(alone)
            # A space that is a token of its own stays allowed: the first sequence covers the word behind it.
            if after_space[-len(alone) :] != alone:
                sequences.append(after_space)
        return tuple(sequences)


def derived_seed(seed: int, index: int) -> int:
    """A seed for each choice: the request's own for the first, well mixed others for the rest. 64-bit, signed."""
    if index == 0:
        return seed
    mixed = (seed + index * 0x9E3779B97F4A7C15) & _MASK_64  # splitmix64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
    mixed ^= mixed >> 31
    return mixed - (1 << 64) if mixed >> 63 else mixed


def _num_chars(value: object) -> int:
    """Characters of all strings in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + _num_chars(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(_num_chars, value))
    return 4


def _with_argument_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of tool calls as objects, which is what templates write out; the API has them as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, (list, tuple)):
        return message
    return {**message, "tool_calls": [_with_argument_object(call) for call in calls]}


def _with_argument_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call  # what a model once wrote may be no JSON; it is shown to it as it was
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
