"""What the server asks of the text layer, and what it gets back. No wire format and no tokenizer is known here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock.messages import EngineRequest, RequestOutput, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPrompt:
    """A conversation to be rendered by the model's chat template."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One validated request of any protocol. Each prompt gives sampling.n sequences, in the order of the prompts.

    request_id: unique in this process. namespace: whose prefix cache may be used. Times: time.monotonic() seconds.
    """

    request_id: str
    prompts: Sequence[str | list[int] | ChatPrompt]
    sampling: SamplingParams
    namespace: str = ""
    priority: int = 0
    arrival_s: float = 0.0
    deadline_s: float | None = None
    add_special_tokens: bool = True
    needs_prompt_text: bool = False


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as text. data: its exact bytes, which need not be valid UTF-8 alone."""

    text: str
    data: bytes
    logprob: float
    token_id: int
    rank: int = 0
    top: Sequence[TokenText] = ()


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one output added. finish_reason: "stop", "length", "abort", "error" or "timeout" with the last one.

    stop_reason: the stop string or token that ended it. is_cut: a stop string ended it here, and the engine still runs.
    """

    text: str = ""
    logprobs: Sequence[TokenText] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    is_cut: bool = False


class OutputState(Protocol):
    """Turns the outputs of one sequence into text."""

    def add(self, output: RequestOutput) -> TextDelta: ...

    def prompt_logprobs(self) -> Sequence[TokenText | None] | None:
        """Of every prompt token (None for the first), when they were asked for and have come."""
        ...


@dataclass(slots=True)
class Sequenced:
    """One sequence to generate. prompt_text: when needs_prompt_text was set."""

    request: EngineRequest
    state: OutputState
    prompt_text: str = ""


class TextLayer(Protocol):
    """Chat template, tokenizer and detokenizer of the served model."""

    has_tool_calls: bool  # the model's template writes calls in Hermes style

    async def prepare(self, request: GenerationRequest) -> list[Sequenced]:
        """Renders, encodes and checks a request. Raises ValidationError, ContextOverflowError."""
        ...
