"""What the offline API returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.frontend.output import LogprobEntry, TextOutput
from penstock.messages import ErrorInfo, FinishReason, RequestTimings


@dataclass(slots=True)
class Completion:
    """One generated sequence.

    stop_reason: the stop string or token id that ended it, if one did. error: why it failed, if it did; the others of
    a call are not touched by that. timings: time.monotonic() seconds.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobEntry] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: ErrorInfo | None = None
    timings: RequestTimings | None = None

    def add(self, output: TextOutput) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs = (self.logprobs or []) + output.logprobs
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason
        self.error = output.error
        self.timings = output.timings


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
