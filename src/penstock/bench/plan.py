"""What is to be sent and when: datasets make it, arrivals date it, the load client sends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
# Text or token ids for /v1/completions; messages for /v1/chat/completions.
Prompt = str | list[int] | list[Message]


@dataclass(slots=True)
class PlannedRequest:
    """One request.

    at_s: intended send, seconds after the start of the run; None: as soon as the arrival process has a place for it.
    prompt_tokens: as planned, 0 if unknown. output_tokens: max_tokens, and the length that is expected.
    session, turn: the turns of a session are sent one after another, whatever at_s says; a later turn is due `think_s`
    after the end of the one before or, with think_s None, at `at_s` or that end, whichever is later.
    extends_session: the prompt holds new messages only; what was said before, by both, is put in front when it is sent.
    answer_span: these positions of a token prompt are the answer to the turn before; where the server tells its
    answers' token ids, they are put there when it is sent.
    cancel_after_s: the client hangs up this long after the intended send. tenant: sent as `user`. parameters: further
    fields of the body.
    """

    prompt: Prompt
    prompt_tokens: int
    output_tokens: int
    index: int = 0
    at_s: float | None = None
    session: str = ""
    turn: int = 0
    think_s: float | None = None
    extends_session: bool = False
    answer_span: tuple[int, int] | None = None
    cancel_after_s: float | None = None
    tenant: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], dict)
