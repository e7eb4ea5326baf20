"""The request of POST /v1/responses as typed structs. An unknown field is an error.

Fields typed `Any` are OpenAI's that are not supported: only their no-op values pass (see NO_OP_VALUES).
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec


class _Part(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    text: str


class InputText(_Part, tag="input_text"):
    pass


class OutputText(_Part, tag="output_text"):
    annotations: list[None] | None = None
    logprobs: Any = None


class _Item(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    id: str | None = None
    status: str | None = None


class MessageItem(_Item, tag="message"):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText]
    phase: Any = None


class FunctionCallItem(_Item, tag="function_call"):
    call_id: str
    name: str
    arguments: str
    namespace: None = None
    caller: None = None


class FunctionOutputItem(_Item, tag="function_call_output"):
    call_id: str
    output: str | list[InputText]
    caller: None = None


class ReasoningText(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="reasoning_text"):
    text: str


class ReasoningItem(_Item, tag="reasoning"):
    summary: list[None] = []
    content: list[ReasoningText] | None = None
    encrypted_content: None = None


InputItem = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem


class FunctionTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """strict: whether the arguments are made to obey the schema wherever the tool is called."""

    name: str
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ForcedTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """tool_choice that names a tool."""

    type: Literal["function"]
    name: str


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """schema, name, description, strict: of json_schema, which is enforced either way."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """effort: `none` switches thinking off in templates that can; other words are for templates that know degrees."""

    effort: str | None = None
    summary: None = None
    generate_summary: None = None


class ResponseRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/responses."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    background: bool | None = None
    background_options: Any = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ForcedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Any = None
    truncation: Any = None
    include: Any = None
    service_tier: Any = None
    conversation: Any = None
    prompt: Any = None
    max_tool_calls: Any = None
    top_logprobs: Any = None
    stream_options: Any = None
    context_management: Any = None
    prompt_cache_options: Any = None
    moderation: Any = None
    access_programs: Any = None
    image: Any = None


# Values that ask for what happens anyway; any other value of these fields is refused by name.
NO_OP_VALUES: Final[dict[str, tuple[Any, ...]]] = {
    "background_options": ({}, {"completion_window": "soonest"}),
    "prompt_cache_retention": ("in_memory",),
    "truncation": ("disabled",),
    "include": ([],),
    "service_tier": ("auto", "default"),
    "conversation": (),
    "prompt": (),
    "max_tool_calls": (),
    "top_logprobs": (0,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "context_management": ([],),
    "prompt_cache_options": ({},),
    "moderation": (),
    "access_programs": ([],),
    "image": (),
}
