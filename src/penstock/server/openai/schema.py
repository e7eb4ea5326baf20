"""The requests as typed structs: what a client may send, field by field. An unknown field is an error.

Fields typed `Any` are OpenAI's that are not supported yet: only their no-op values pass (see NO_OP_VALUES).
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec


class TextPart(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    """arguments: JSON text, as the model wrote it."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message. refusal, audio, function_call, annotations: null or empty, as clients that echo an answer send."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[None] | None = None


class FunctionDefinition(msgspec.Struct, forbid_unknown_fields=True):
    """parameters: a JSON schema. strict: whether the arguments are made to obey it wherever the tool is called."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class ForcedTool(msgspec.Struct, forbid_unknown_fields=True):
    """tool_choice that names a tool."""

    function: NamedFunction
    type: Literal["function"] = "function"


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True):
    """name and description are for the reader. strict: a schema is enforced either way."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """What the whole answer has to be. structures, triggers, format: of a structural tag (vLLM's). value: TGI's name
    for the schema of json_object or json, and for the pattern of regex; huggingface_hub sends it."""

    type: Literal["text", "json_object", "json_schema", "structural_tag", "json", "regex"]
    value: dict[str, Any] | str | None = None
    json_schema: JsonSchemaFormat | None = None
    structures: list[Any] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's field: exactly one of these. Schema and tag as objects or as JSON text."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """include_obfuscation pads chunks against traffic analysis; only false passes."""

    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: Literal[False] | None = None


class _Sampled(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take. Null means the default, as with OpenAI."""

    model: str
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[int, float] | None = None
    max_tokens: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    # vLLM's additions.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    # llama.cpp's.
    top_n_sigma: float | None = None
    typical_p: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_sequence_breakers: list[str] | None = None
    # vLLM's again.
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    truncate_prompt_tokens: Any = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    # OpenAI's, meaningless or not supported here.
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: Any = None
    store: Any = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


class ChatRequest(_Sampled, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    return_token_ids: Literal[False] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | ForcedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: Any = None
    web_search_options: Any = None
    function_call: Any = None
    functions: Any = None
    prompt_cache_retention: Any = None
    chat_template: Any = None
    documents: Any = None
    thinking_token_budget: int | None = None
    prompt_cache_options: Any = None
    moderation: Any = None
    tool_prompt: Any = None


class CompletionRequest(_Sampled, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions. prompt: a text, texts, token ids, or lists of token ids."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None


class GenerateRequest(_Sampled, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/generate. Either token_ids or prompt."""

    token_ids: list[int] | None = None
    prompt: str | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize. Either prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


# Values that ask for what happens anyway; any other value of these fields is refused by name.
NO_OP_VALUES: Final[dict[str, tuple[Any, ...]]] = {
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "function_call": ("none",),
    "functions": ([],),
    "prompt_cache_retention": ("in_memory",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "documents": ([],),
    "prompt_cache_options": ({},),
    "moderation": (),
    "tool_prompt": (),
}
