"""From a raw body to typed, bounded values: every refusal names the field. Pure; nothing is read or sent here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from penstock.base.errors import ValidationError
from penstock.frontend.beam_search import BeamSearchParams
from penstock.frontend.fill_in_middle import Gap
from penstock.messages import SamplingParams
from penstock.messages.bounds import MAX_ENTRIES
from penstock.messages.sampling import check_bound
from penstock.server.body import decode_body, schema_error
from penstock.server.openai.constraints import response_grammar
from penstock.server.openai.schema import (
    NO_OP_VALUES,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    ToolDefinition,
)

_chat_decoder = msgspec.json.Decoder(ChatRequest)
_completion_decoder = msgspec.json.Decoder(CompletionRequest)
DEFAULT_COMPLETION_TOKENS: Final = 16  # OpenAI's default for /v1/completions


def decode_chat(body: bytes, *, lenient: bool = False) -> tuple[ChatRequest, list[str]]:
    """The request and the unknown fields that were ignored. Raises ValidationError."""
    request, ignored = decode_body(_chat_decoder, body, lenient=lenient)
    check_request(request)
    _check_messages(request)
    if request.tools:
        _check_tools(request.tools)
    return request, ignored


def decode_completion(body: bytes, *, lenient: bool = False) -> tuple[CompletionRequest, list[str]]:
    """The request and the unknown fields that were ignored. Raises ValidationError."""
    request, ignored = decode_body(_completion_decoder, body, lenient=lenient)
    check_request(request)
    return request, ignored


def check_request(request: ChatRequest | CompletionRequest | GenerateRequest) -> None:
    """What all three have in common. Raises ValidationError."""
    for name, allowed in NO_OP_VALUES.items():
        value = getattr(request, name, None)
        if value is not None and value not in allowed:
            raise ValidationError(f"{name} is not supported with this value.", remedy="Leave it out.", param=name)
    if request.stream_options is not None and not request.stream:
        raise ValidationError("stream_options needs stream: true.", param="stream_options")
    if request.priority is not None:
        check_bound("priority", request.priority)
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        value = getattr(request, name)
        if value is not None and len(value) > MAX_ENTRIES["user_chars"]:
            raise ValidationError(f"{name} is over {MAX_ENTRIES['user_chars']} characters.", param=name)
    salt = request.cache_salt
    if salt is not None and not 0 < len(salt) <= MAX_ENTRIES["namespace_chars"]:
        raise ValidationError(
            f"cache_salt must have 1 to {MAX_ENTRIES['namespace_chars']} characters.", param="cache_salt"
        )
    metadata = request.metadata or {}
    longest = max((len(text) for pair in metadata.items() for text in pair), default=0)
    if len(metadata) > MAX_ENTRIES["metadata"] or longest > MAX_ENTRIES["user_chars"]:
        raise ValidationError(
            f"metadata takes {MAX_ENTRIES['metadata']} pairs of up to {MAX_ENTRIES['user_chars']} characters.",
            param="metadata",
        )


# What a search for the likeliest outputs can be combined with; everything else would change what is likely.
_WITH_BEAMS: Final = frozenset((
    "model", "messages", "prompt", "token_ids", "n", "best_of", "max_tokens", "max_completion_tokens",
    "use_beam_search", "length_penalty", "early_stopping", "ignore_eos", "user", "metadata", "priority", "cache_salt",
    "safety_identifier", "prompt_cache_key", "service_tier", "store", "skip_special_tokens", "add_special_tokens",
    "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "return_token_ids", "seed",
))  # fmt: skip


def beams_of(request: ChatRequest | CompletionRequest | GenerateRequest) -> BeamSearchParams | None:
    """The beam search that was asked for: best_of (or n) beams, of which the n best are given.

    Raises ValidationError.
    """
    if not request.use_beam_search:
        for name, idle in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(request, name) not in (None, idle):
                raise ValidationError(f"{name} needs use_beam_search.", param=name)
        return None
    for name in request.__struct_fields__:
        value = getattr(request, name)
        is_idle = value is None or value is False or (name == "temperature" and value in (0.0, 1.0))
        if not is_idle and name not in _WITH_BEAMS:
            raise ValidationError(f"{name} cannot be combined with use_beam_search.", param=name)
    n = request.n or 1
    width = getattr(request, "best_of", None) or n
    if width < n:
        raise ValidationError("best_of must be at least n.", param="best_of")
    penalty = request.length_penalty
    beams = BeamSearchParams(width, 1.0 if penalty is None else penalty, bool(request.early_stopping))
    beams.validate()
    return beams


def _check_messages(request: ChatRequest) -> None:
    if not request.messages:
        raise ValidationError("messages is empty.", param="messages")
    if len(request.messages) > MAX_ENTRIES["messages"]:
        raise ValidationError(f"messages has more than {MAX_ENTRIES['messages']} entries.", param="messages")
    for index, message in enumerate(request.messages):
        if message.content is None and not message.tool_calls:
            raise ValidationError(
                f"messages[{index}].content is required.", remedy="Only an assistant's tool_calls can stand alone.",
                param=f"messages[{index}].content",
            )  # fmt: skip
    if request.continue_final_message:
        if request.messages[-1].role != "assistant":
            raise ValidationError(
                "continue_final_message needs a last message of the assistant.", param="continue_final_message"
            )
        if request.add_generation_prompt:
            raise ValidationError(
                "continue_final_message and add_generation_prompt exclude each other.", param="add_generation_prompt"
            )


def _check_tools(tools: list[dict[str, Any]]) -> None:
    if len(tools) > MAX_ENTRIES["tools"]:
        raise ValidationError(f"tools has more than {MAX_ENTRIES['tools']} entries.", param="tools")
    for index, tool in enumerate(tools):
        try:
            msgspec.convert(tool, ToolDefinition)
        except msgspec.ValidationError as error:
            problem = schema_error(str(error))
            param = f"tools[{index}]" + (f".{problem.param}" if problem.param else "")
            raise ValidationError(f"tools[{index}]: {problem.message}", param=param) from None


def chat_sampling(request: ChatRequest) -> SamplingParams:
    """Raises ValidationError."""
    max_tokens = request.max_tokens
    if request.max_completion_tokens is not None:
        if max_tokens not in (None, request.max_completion_tokens):
            raise ValidationError(
                "max_tokens and max_completion_tokens differ.", remedy="Send one of them.", param="max_tokens"
            )
        max_tokens = request.max_completion_tokens
    logprobs: int | None = None
    if request.logprobs:
        logprobs = request.top_logprobs or 0
    elif request.top_logprobs:
        raise ValidationError("top_logprobs needs logprobs: true.", param="top_logprobs")
    if request.top_logprobs is not None:
        _check_named("logprobs", request.top_logprobs, "top_logprobs")
    return _sampling(request, max_tokens, logprobs, request.prompt_logprobs)


def completion_sampling(request: CompletionRequest) -> SamplingParams:
    """Raises ValidationError. max_tokens 0 with echo asks for the prompt's log-probabilities: see `scores_only`."""
    if request.best_of is not None and request.best_of != (request.n or 1) and not request.use_beam_search:
        raise ValidationError("best_of must equal n: ranking candidates is not supported.", param="best_of")
    max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    if scores_only(request):
        max_tokens = 1
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        prompt_logprobs = max(prompt_logprobs or 0, request.logprobs)
    return _sampling(request, max_tokens, request.logprobs, prompt_logprobs)


def generate_sampling(request: GenerateRequest) -> SamplingParams:
    """Raises ValidationError."""
    return _sampling(request, request.max_tokens, request.logprobs, None)


def scores_only(request: CompletionRequest) -> bool:
    """Whether only the echoed prompt is wanted (max_tokens 0): one token is generated and not shown."""
    return bool(request.echo) and request.max_tokens == 0


def _sampling(
    request: ChatRequest | CompletionRequest | GenerateRequest,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    stop: tuple[str, ...] = ()
    if request.stop is not None:
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    breakers = request.dry_sequence_breakers
    given: dict[str, Any] = {
        "n": request.n,
        "temperature": request.temperature,
        "top_k": 0 if request.top_k == -1 else request.top_k,  # vLLM's word for off
        "top_p": request.top_p,
        "min_p": request.min_p,
        "top_n_sigma": request.top_n_sigma,
        "typical_p": request.typical_p,
        "xtc_probability": request.xtc_probability,
        "xtc_threshold": request.xtc_threshold,
        "dynatemp_range": request.dynatemp_range,
        "dynatemp_exponent": request.dynatemp_exponent,
        "mirostat": request.mirostat,
        "mirostat_tau": request.mirostat_tau,
        "mirostat_eta": request.mirostat_eta,
        "dry_multiplier": request.dry_multiplier,
        "dry_base": request.dry_base,
        "dry_allowed_length": request.dry_allowed_length,
        "dry_sequence_breakers": None if breakers is None else tuple(breakers),
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
        "seed": request.seed,
        "logit_bias": request.logit_bias,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "stop": stop,
        "stop_token_ids": tuple(request.stop_token_ids) if request.stop_token_ids else None,
        "bad_words": tuple(request.bad_words) if request.bad_words else None,
        "max_tokens": max_tokens,
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
        "include_stop_str_in_output": request.include_stop_str_in_output,
        "skip_special_tokens": request.skip_special_tokens,
        "grammar": response_grammar(request),
    }
    sampling = SamplingParams(**{name: value for name, value in given.items() if value is not None})
    sampling.validate()
    return sampling


def _check_named(bound: str, value: int, param: str) -> None:
    """check_bound for a field that OpenAI calls otherwise."""
    try:
        check_bound(bound, value)
    except ValidationError as error:
        raise ValidationError(error.message.replace(bound, param, 1), param=param) from None


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as plain values for the chat template; `developer` becomes `system`, which templates know."""
    rendered: list[dict[str, Any]] = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        entry: dict[str, Any] = {"role": role, "content": _content(message)}
        if message.name is not None:
            entry["name"] = message.name
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        if message.reasoning_content is not None:
            entry["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            entry["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in message.tool_calls
            ]
        rendered.append(entry)
    return rendered


def _content(message: ChatMessage) -> str | list[dict[str, str]]:
    """Text, or parts for the template to take apart. An assistant's bare tool calls have empty text."""
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    return [{"type": "text", "text": part.text} for part in message.content]


def completion_sources(request: CompletionRequest) -> Sequence[str | list[int] | Gap]:
    """The prompts; with a suffix, each is the text before a gap. Raises ValidationError."""
    prompts = completion_prompts(request)
    if not request.suffix:
        return prompts
    if request.echo:
        raise ValidationError("echo cannot be combined with suffix.", param="echo")
    gaps = [Gap(prompt, request.suffix) for prompt in prompts if isinstance(prompt, str)]
    if len(gaps) < len(prompts):
        raise ValidationError("suffix needs a prompt of text, not of token ids.", param="suffix")
    return gaps


def completion_prompts(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts: one text, one list of token ids, or several of either. Raises ValidationError."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ValidationError("prompt is empty.", param="prompt")
    if all(isinstance(item, int) for item in prompt):
        return [[item for item in prompt if isinstance(item, int)]]
    if len(prompt) > MAX_ENTRIES["prompts"]:
        raise ValidationError(f"prompt has more than {MAX_ENTRIES['prompts']} entries.", param="prompt")
    prompts: list[str | list[int]] = []
    for item in prompt:
        if isinstance(item, int) or type(item) is not type(prompt[0]):
            raise ValidationError("prompt mixes texts and token ids.", remedy="Send one kind.", param="prompt")
        prompts.append([_token_id(element) for element in item] if isinstance(item, list) else item)
    return prompts


def _token_id(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValidationError("prompt holds a token id that is not a whole number.", param="prompt")
    return value
