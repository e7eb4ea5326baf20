"""The requests as typed structs: what a client may send, field by field. An unknown field is an error.

Fields typed `Any` are Ollama's that are not supported: only their no-op values pass (see NO_OP_VALUES).
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """A call in an earlier message. arguments: an object, unlike OpenAI's text."""

    name: str
    arguments: dict[str, Any] = {}
    index: int | None = None


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    function: Function
    id: str | None = None
    type: str | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[None] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Model parameters. num_predict: -1 and -2 mean "to the end of the context"."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    num_predict: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None
    num_ctx: int | None = None
    repeat_last_n: Any = None
    num_keep: Any = None
    typical_p: Any = None
    tfs_z: Any = None
    mirostat: Any = None
    mirostat_tau: Any = None
    mirostat_eta: Any = None
    penalize_newline: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    num_thread: Any = None
    low_vram: Any = None
    use_mmap: Any = None
    use_mlock: Any = None
    numa: Any = None
    f16_kv: Any = None
    vocab_only: Any = None
    logits_all: Any = None
    embedding_only: Any = None


class _Asked(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints take.

    keep_alive: accepted; the model stays loaded as long as the server runs. format: "json", or a JSON schema.
    """

    model: str
    stream: bool | None = None
    options: Options | None = None
    keep_alive: str | float | None = None
    think: bool | str | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    logprobs: Any = None
    top_logprobs: Any = None
    truncate: Any = None
    shift: Any = None


class ChatRequest(_Asked, kw_only=True, forbid_unknown_fields=True):
    """POST /api/chat."""

    messages: list[Message] = []
    tools: list[dict[str, Any]] | None = None


class GenerateRequest(_Asked, kw_only=True, forbid_unknown_fields=True):
    """POST /api/generate. raw: the prompt goes to the model as it is, without a chat template."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    images: list[None] | None = None
    suffix: str | None = None
    template: Any = None
    context: Any = None
    width: Any = None
    height: Any = None
    steps: Any = None


class ShowRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /api/show. name: an older spelling of model."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


# Values that ask for what happens anyway; any other value of these fields is refused by name.
NO_OP_VALUES: Final[dict[str, tuple[Any, ...]]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "truncate": (False,),
    "shift": (False,),
    "template": ("",),
    "context": ([],),
    "width": (0,),
    "height": (0,),
    "steps": (0,),
}
NO_OP_OPTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "repeat_last_n": (-1,),
    "num_keep": (-1,),
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "mirostat": (0,),
    "mirostat_tau": (),
    "mirostat_eta": (),
    "penalize_newline": (True,),
    "num_batch": (),
    "num_gpu": (),
    "main_gpu": (),
    "num_thread": (0,),
    "low_vram": (False,),
    "use_mmap": (True,),
    "use_mlock": (False,),
    "numa": (False,),
    "f16_kv": (True,),
    "vocab_only": (False,),
    "logits_all": (False,),
    "embedding_only": (False,),
}
