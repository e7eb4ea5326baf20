"""How many prefill tokens may share a step with decodes, so that no stream stalls; learnt from measured steps."""

from __future__ import annotations

from typing import Final

_START_TOKENS: Final = 256
_MIN_TOKENS: Final = 16
_MAX_CHANGE: Final = 2.0
_SMOOTHING: Final = 0.2
_SLOWDOWN: Final = 2.0


class PrefillPace:
    """Keeps mixed steps near a target duration: the configured one, or twice a step of decodes alone if that is longer.

    A chunk sized in tokens is right for one machine, model and context length only. So the limit follows the steps:
    after one with prefill in it, limit = tokens * target / seconds, at most doubled or halved. As a step's duration
    is some fixed part plus a part that grows with its tokens, this approaches the target from either side without
    swinging. Steps without decodes may use the whole budget: nobody's stream waits for them, but they teach the limit
    as well.
    """

    __slots__ = ("_decode_s", "_target_s", "is_on", "limit")

    def __init__(self, target_s: float) -> None:
        """target_s: seconds; 0 switches it off."""
        self.is_on = target_s > 0
        self._target_s = target_s
        self._decode_s = 0.0
        self.limit = _START_TOKENS

    def observe(self, num_prefill_tokens: int, seconds: float) -> None:
        """A step with these tokens took that long."""
        if seconds <= 0:
            return
        if num_prefill_tokens == 0:
            weight = _SMOOTHING if self._decode_s > 0 else 1.0
            self._decode_s += weight * (seconds - self._decode_s)
            return
        target_s = max(self._target_s, _SLOWDOWN * self._decode_s)
        wanted = num_prefill_tokens * target_s / seconds
        if seconds > target_s:
            self.limit = max(_MIN_TOKENS, int(max(min(wanted, self.limit), self.limit / _MAX_CHANGE)))
        elif wanted > self.limit:
            self.limit = int(min(wanted, self.limit * _MAX_CHANGE))
