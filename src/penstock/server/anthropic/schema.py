"""The requests as typed structs: what a client may send, field by field. An unknown field is an error.

Fields typed `Any` are Anthropic's that are not supported: only their no-op values pass (see NO_OP_VALUES).
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec


class CacheControl(msgspec.Struct, forbid_unknown_fields=True):
    """Keeps the prompt up to here in the prefix cache for that long (5m where it says nothing) after its last use."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class _Block(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    cache_control: CacheControl | None = None


class TextBlock(_Block, tag="text"):
    text: str
    citations: None = None


class ToolUseBlock(_Block, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None


class ToolResultBlock(_Block, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


class ThinkingBlock(_Block, tag="thinking"):
    """signature: what an answer here carries, and nothing is made of it."""

    thinking: str
    signature: str = ""


ContentBlock = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None
    strict: bool | None = None
    input_examples: Any = None
    defer_loading: Any = None
    eager_input_streaming: Any = None
    allowed_callers: Any = None


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    """effort: for chat templates that know degrees of reasoning. format: what the answer has to be."""

    effort: str | None = None
    format: JsonSchemaFormat | None = None


class Metadata(msgspec.Struct, forbid_unknown_fields=True):
    user_id: str | None = None


class _Prompted(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take."""

    model: str
    messages: list[Message]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: CacheControl | None = None
    output_config: OutputConfig | None = None
    output_format: JsonSchemaFormat | None = None
    context_management: Any = None
    mcp_servers: Any = None
    speed: Any = None
    betas: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None


class MessagesRequest(_Prompted, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    metadata: Metadata | None = None
    service_tier: Any = None
    container: Any = None
    inference_geo: Any = None
    diagnostics: Any = None
    compaction: Any = None
    fallback_credit_token: Any = None
    billing_policy: Any = None
    thread: Any = None
    fallbacks: Any = None


class CountTokensRequest(_Prompted, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/messages/count_tokens."""


# Values that ask for what happens anyway; any other value of these fields is refused by name.
NO_OP_VALUES: Final[dict[str, tuple[Any, ...]]] = {
    "service_tier": ("auto", "standard_only"),
    "container": (),
    "inference_geo": (),
    "context_management": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
    "betas": ([],),
    "user_profile_id": (),
    "workspace_id": (),
    "diagnostics": (),
    "compaction": (),
    "fallback_credit_token": (),
    "billing_policy": (),
    "thread": (),
    "fallbacks": ([],),
}
