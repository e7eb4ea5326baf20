"""When which request expires."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from penstock.scheduler.request import Request, RequestState

_MIN_COMPACT = 64


class Deadlines:
    """A heap by deadline. Requests that end before theirs stay in it until they surface, or outnumber the living."""

    __slots__ = ("_heap", "_num_added")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._num_added = 0

    def add(self, request: Request, num_living: int) -> None:
        """num_living: requests in the scheduler, at most so many of which are in the heap and alive."""
        if request.deadline_s is None:
            return
        if len(self._heap) > _MIN_COMPACT and len(self._heap) > 2 * num_living:
            self._heap = [entry for entry in self._heap if entry[2].state is not RequestState.FINISHED]
            heapify(self._heap)
        self._num_added += 1
        heappush(self._heap, (request.deadline_s, self._num_added, request))

    def take_expired(self, now: float) -> Iterator[Request]:
        """Requests whose deadline is at or before `now` and which have not ended, earliest first."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            request = heappop(heap)[2]
            if request.state is not RequestState.FINISHED:
                yield request

    def __len__(self) -> int:
        return len(self._heap)
