"""How much background work (a batch) a step may take while somebody else is about; learnt from measured steps."""

from __future__ import annotations

from typing import Final

from penstock.scheduler.plan import StepPlan
from penstock.scheduler.prefill_pace import PrefillPace

# Who has asked within so long is likely to ask again.
WATCH_S: Final = 10.0
# A step with background work in it may take so many times as long as one of the others' decodes alone.
SLOWDOWN: Final = 1.25
# A step of background work alone that nobody watches takes only so much prefill that it lasts about this long (or twice
# a step of decodes): whoever comes after all waits for one or two of them.
UNWATCHED_STEP_S: Final = 0.02
_PROBE_STEPS: Final = 32
_SMOOTHING: Final = 0.25
_FALL: Final = 0.8
_RISE: Final = 0.25


class BackgroundPace:
    """Whoever comes while a step of background work runs waits for its end, and then shares steps with the rest of it.

    While others are about, or were within WATCH_S, a step takes at most `limit` tokens of background work. The limit
    rises slowly while steps that used it all stay below SLOWDOWN times a step of the others' decodes, and falls by a
    factor when one does not (additive increase, multiplicative decrease); so where rows are nearly free, many share.
    Every _PROBE_STEPS steps with background work one goes without, which keeps the comparison up to date. No background
    work shares a step with somebody's prompt, and a step of background work alone is not planned while another is in
    flight. Nobody about: no limit but on its prefill.
    """

    __slots__ = ("_limit", "_num_shared", "_others_s", "_prefill", "_seen_s", "is_on", "is_watched")

    def __init__(self, *, is_on: bool) -> None:
        """is_on: else it never limits anything; where nobody watches, or a text is computed whole."""
        self.is_on = is_on
        self.is_watched = False
        self._seen_s = -WATCH_S
        self._limit = 1.0
        self._others_s = 0.0
        self._num_shared = 0
        self._prefill = PrefillPace(UNWATCHED_STEP_S)

    @property
    def limit(self) -> int:
        return int(self._limit)

    @property
    def prefill_limit(self) -> int:
        return self._prefill.limit

    def tick(self, now: float, has_others: bool) -> None:
        """Called once a step before it is planned, with whether anybody's request but background ones is open."""
        if has_others:
            self._seen_s = now
        self.is_watched = self.is_on and now - self._seen_s < WATCH_S

    def budget(self, plan: StepPlan, is_idle: bool) -> int:
        """Tokens of background work that a plan may take, which holds everybody else's share by now.

        is_idle: no step is in flight.
        """
        if not self.is_watched:
            return plan.budget
        if plan.num_tokens > plan.num_decodes or plan.restoring:
            return 0
        if not plan.num_tokens:
            return min(plan.budget, self.limit) if is_idle else 0
        self._num_shared = (self._num_shared + 1) % _PROBE_STEPS
        return min(plan.budget, self.limit) if self._num_shared and self._others_s else 0

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step took that long."""
        if seconds <= 0:
            return
        num_background = plan.num_tokens - plan.num_others_tokens
        if not plan.num_others_tokens:
            self._prefill.observe(plan.num_tokens - plan.num_decodes, seconds)
        elif not num_background and plan.num_tokens == plan.num_decodes:
            weight = _SMOOTHING if self._others_s > 0 else 1.0
            self._others_s += weight * (seconds - self._others_s)
        if not self.is_watched or not num_background or not self._others_s:
            return
        if seconds > SLOWDOWN * self._others_s:
            self._limit = max(1.0, self._limit * _FALL)
        elif num_background >= self.limit:
            self._limit += _RISE
