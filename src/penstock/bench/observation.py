"""What the client saw of one request, before anything is concluded from it. Times: seconds of the run's one clock."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

from penstock.bench.plan import PlannedRequest


@dataclass(slots=True)
class Observation:
    """One request and what came back.

    intended_s: when it was to be sent. started_s: when the client turned to it (began to connect, or to write).
    sent_s: when its bytes were handed to the socket. ended_s: the end of the response, or of the attempt.
    chunk_s: arrival of each event that brought output (text, reasoning, tool calls or token ids). chunk_tokens: tokens
    in each of these where the server says so, else 0. finish_reason, is_done: as the stream said; is_done is also true
    of a whole body. output_tokens, prompt_tokens, cached_tokens: of `usage`, -1 if it did not come.
    text, token_ids: of the answer, kept only where a later turn needs them.
    failure: empty for a good answer, else one short, countable phrase. refusal: what the server said of it.
    """

    request: PlannedRequest
    intended_s: float
    started_s: float = math.nan
    sent_s: float = math.nan
    ended_s: float = math.nan
    status: int = 0
    is_stream: bool = False
    finish_reason: str = ""
    is_done: bool = False
    failure: str = ""
    refusal: str = ""
    is_cancelled: bool = False
    output_tokens: int = -1
    prompt_tokens: int = -1
    cached_tokens: int = -1
    # The first and the last event with a choice, even an empty one: vLLM's first token, and where it ends a request.
    first_event_s: float = math.nan
    last_event_s: float = math.nan
    num_choice_events: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    chunk_s: array[float] = field(default_factory=lambda: array("d"))
    chunk_tokens: array[int] = field(default_factory=lambda: array("l"))

    @property
    def is_success(self) -> bool:
        return not self.failure and not self.is_cancelled

    @property
    def last_token_s(self) -> float:
        """Arrival of the last token: of the last output, or, where tokens that made no text came after it (the server
        counted them), of the last event."""
        told = sum(self.chunk_tokens)
        ends_in_silence = 0 < told < self.output_tokens and 0 not in self.chunk_tokens
        return max(self.last_event_s, self.chunk_s[-1]) if ends_in_silence else self.chunk_s[-1]

    def conclude(self, now_s: float) -> None:
        """The response ended. Success needs status 200, a finish_reason and, of a stream, [DONE]."""
        self.ended_s = now_s
        if self.failure or self.is_cancelled:
            return
        if self.status != 200:
            self.failure = f"status {self.status}"
        elif not self.finish_reason:
            self.failure = "no finish_reason"
        elif self.finish_reason in ("error", "abort"):
            self.failure = f"finish_reason {self.finish_reason}"
        elif not self.is_done:
            self.failure = "no [DONE]"
        elif not self.chunk_s:
            self.chunk_s.append(now_s)  # an answer of no visible output: it can be read at its end
            self.chunk_tokens.append(0)
