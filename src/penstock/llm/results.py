"""What the offline API returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.frontend.beam_search import Beam
from penstock.frontend.one_pass import vector_of
from penstock.frontend.output import LogprobEntry, OutputState, TextOutput
from penstock.messages import ErrorInfo, FinishReason, RequestOutput, RequestTimings


@dataclass(slots=True)
class Completion:
    """One generated sequence.

    stop_reason: the stop string or token id that ended it, if one did. error: why it failed, if it did; the others of
    a call are not touched by that. timings: time.monotonic() seconds. score: what beam search ranked it by.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobEntry] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: ErrorInfo | None = None
    timings: RequestTimings | None = None
    score: float | None = None

    def add(self, output: TextOutput) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason
        self.error = output.error
        self.timings = output.timings


def of_beam(index: int, beam: Beam, state: OutputState) -> Completion:
    """What a beam reads like. state: fresh, of its request."""
    reason = FinishReason.LENGTH if beam.stop_token_id is None else FinishReason.STOP
    output = RequestOutput("", list(beam.token_ids), finish_reason=reason, stop_token_id=beam.stop_token_id)
    completion = Completion(index, score=beam.score)
    completion.add(state.process(output))
    return completion


@dataclass(frozen=True, slots=True)
class Embedding:
    """A text's vector. num_prompt_tokens: of the text, with what the tokenizer puts around it."""

    vector: list[float]
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Classification:
    """A classifier's verdict. label: of the highest score. scores: by label, as probabilities unless raw."""

    label: str
    scores: dict[str, float]
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document's place in a ranking. index: in the list that was given."""

    index: int
    score: float
    document: str


@dataclass(slots=True)
class Generation:
    """A prompt and the sequences made from it. prompt: its text, None when it came as token ids.

    num_cached_tokens: prompt tokens that the prefix cache saved, of the first sequence.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[LogprobEntry | None] | None = None
    num_cached_tokens: int = 0


def classification(labels: Sequence[str], pooled: bytes, num_prompt_tokens: int) -> Classification:
    """From what an engine gave for a text."""
    scores = dict(zip(labels, vector_of(pooled), strict=True))
    return Classification(max(scores, key=lambda label: scores[label]), scores, num_prompt_tokens)
