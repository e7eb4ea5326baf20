"""The waiting requests, best rank first."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from penstock.scheduler.request import Rank, Request, RequestState

_MIN_COMPACT = 64


class WaitingQueue:
    """A heap by rank, so a preempted or parked request comes back to the place that its arrival gives it.

    push and pop are O(log n). A request that ends in the middle is discarded lazily: it stays in the heap as dead
    until it surfaces, or until the dead outnumber the living. Parked requests are out of the heap, but still wait and
    still count. num_requests, num_tokens: living ones, and their prompt tokens.
    """

    __slots__ = ("_heap", "num_parked", "num_requests", "num_tokens")

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, Request]] = []
        self.num_requests = 0
        self.num_tokens = 0
        self.num_parked = 0

    def push(self, request: Request) -> None:
        heappush(self._heap, (request.rank, request))
        self.num_requests += 1
        self.num_tokens += request.num_prompt_tokens

    def peek(self) -> Request | None:
        """The best that is not parked."""
        heap = self._heap
        while heap and heap[0][1].state is RequestState.FINISHED:
            heappop(heap)
        return heap[0][1] if heap else None

    def pop(self) -> Request:
        """Takes out what peek() has just shown."""
        request = heappop(self._heap)[1]
        self.num_requests -= 1
        self.num_tokens -= request.num_prompt_tokens
        return request

    def park(self) -> Request:
        """Takes what peek() has just shown out of the heap; it goes on waiting."""
        request = heappop(self._heap)[1]
        request.is_parked = True
        self.num_parked += 1
        return request

    def unpark(self, request: Request) -> None:
        request.is_parked = False
        self.num_parked -= 1
        heappush(self._heap, (request.rank, request))

    def discard(self, request: Request) -> None:
        """A waiting request has just become FINISHED."""
        self.num_requests -= 1
        self.num_tokens -= request.num_prompt_tokens
        if request.is_parked:
            request.is_parked = False
            self.num_parked -= 1
        elif len(self._heap) > _MIN_COMPACT and len(self._heap) > 2 * (self.num_requests - self.num_parked):
            self._heap = [entry for entry in self._heap if entry[1].state is not RequestState.FINISHED]
            heapify(self._heap)

    def check(self, waiting: list[Request]) -> None:
        """Asserts that exactly these requests wait, and that the counts are theirs."""
        queued = [request for _, request in self._heap if request.state is not RequestState.FINISHED]
        parked = [request for request in waiting if request.is_parked]
        assert sorted(request.rank for request in queued + parked) == sorted(request.rank for request in waiting)
        assert all(rank == request.rank for rank, request in self._heap)
        assert not any(request.is_parked for request in queued)
        assert self.num_parked == len(parked)
        assert self.num_requests == len(waiting)
        assert self.num_tokens == sum(request.num_prompt_tokens for request in waiting)
