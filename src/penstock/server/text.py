"""What the server asks of the text layer (frontend.Processor), and one validated request of any protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.frontend.beam_search import BeamSearchParams
from penstock.frontend.fill_in_middle import Gap
from penstock.frontend.one_pass import ModelTasks, Source
from penstock.frontend.output import TextOutput
from penstock.frontend.parsers.choose import OutputStyle
from penstock.frontend.processor import Chat, Prompt
from penstock.messages import EngineRequest, PoolingParams, RequestOutput, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One validated request of any protocol. Each prompt gives sampling.n sequences, in the order of the prompts.

    request_id: unique in this process. namespace: whose prefix cache may be used. Times: time.monotonic() seconds.
    beams: has the likeliest outputs searched for instead of drawing them. pooling: what is asked for instead of text.
    truncate_tokens: then what is too long is cut to so many, -1 for the context, instead of refused.
    """

    request_id: str
    prompts: Sequence[Source | Chat | Gap]
    sampling: SamplingParams
    namespace: str = ""
    priority: int = 0
    arrival_s: float = 0.0
    deadline_s: float | None = None
    add_special_tokens: bool = True
    beams: BeamSearchParams | None = None
    pooling: PoolingParams | None = None
    truncate_tokens: int | None = None


class OutputState(Protocol):
    """Turns the outputs of one sequence into text: frontend.OutputState."""

    def process(self, output: RequestOutput) -> TextOutput: ...


@dataclass(slots=True)
class Sequenced:
    """One sequence to generate, and the prompt it continues."""

    request: EngineRequest
    state: OutputState
    prompt: Prompt


class TextLayer(Protocol):
    """Chat template, tokenizer and detokenizer of the served model: frontend.Processor behind `ModelText`."""

    style: OutputStyle  # how the model writes calls and reasoning
    tasks: ModelTasks  # what the model can be asked for

    async def prepare(self, request: GenerationRequest) -> list[Sequenced]:
        """Renders, encodes and checks a request. Raises ValidationError, ContextOverflowError."""
        ...

    async def prompt(self, source: str | list[int] | Chat | Gap, *, add_special_tokens: bool = True) -> Prompt:
        """One prompt, as it would go into the engine. Raises ValidationError, ContextOverflowError."""
        ...

    def template(self) -> str:
        """The chat template's source; empty when there is none."""
        ...

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each of these tokens by itself, special ones written out."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all these tokens, special ones written out."""
        ...
