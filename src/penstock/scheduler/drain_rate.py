"""How fast the waiting queue empties, measured; what Retry-After is computed from."""

from __future__ import annotations

_WINDOW_S = 1.0
_SMOOTHING = 0.5
_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 60.0


class DrainRate:
    """Requests and prompt tokens admitted per second, over time in which somebody waited.

    Time with an empty queue says nothing about how fast it could drain, so it does not count.
    """

    __slots__ = ("_admitted_requests", "_admitted_tokens", "_busy_s", "_last_s", "requests_per_s", "tokens_per_s")

    def __init__(self) -> None:
        self.requests_per_s = 0.0
        self.tokens_per_s = 0.0
        self._admitted_requests = 0
        self._admitted_tokens = 0
        self._busy_s = 0.0
        self._last_s: float | None = None

    def admitted(self, num_tokens: int) -> None:
        """A request with that many prompt tokens left the queue in the step being planned."""
        if self._last_s is not None:
            self._admitted_requests += 1
            self._admitted_tokens += num_tokens

    def tick(self, now: float, is_busy: bool) -> None:
        """Called once a step, after admission, with whether anybody still waits."""
        if self._last_s is not None:
            self._busy_s += max(0.0, now - self._last_s)
        self._last_s = now if is_busy else None
        if self._busy_s < _WINDOW_S:
            return
        requests_per_s, tokens_per_s = self._admitted_requests / self._busy_s, self._admitted_tokens / self._busy_s
        weight = _SMOOTHING if self.requests_per_s > 0 else 1.0
        self.requests_per_s += weight * (requests_per_s - self.requests_per_s)
        self.tokens_per_s += weight * (tokens_per_s - self.tokens_per_s)
        self._admitted_requests = self._admitted_tokens = 0
        self._busy_s = 0.0

    def retry_after_s(self, num_excess_requests: int, num_excess_tokens: int) -> float:
        """Seconds until that much has left the queue, between 1 and 60; 1 while nothing has been measured."""
        wait_s = _MIN_RETRY_S
        if self.requests_per_s > 0:
            wait_s = max(wait_s, num_excess_requests / self.requests_per_s)
        if self.tokens_per_s > 0:
            wait_s = max(wait_s, num_excess_tokens / self.tokens_per_s)
        return min(wait_s, _MAX_RETRY_S)
