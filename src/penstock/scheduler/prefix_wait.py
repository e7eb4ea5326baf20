"""Waiting for a prefix that is being computed, instead of computing it again."""

from __future__ import annotations

from penstock.kvcache import TOKEN_BYTES, PrefixMatch
from penstock.scheduler.request import Request

# Waiting costs about one step (a prefix can be hit one step after it was computed), so it must save more than that.
MIN_SAVED_TOKENS = 64


class PrefixWait:
    """Finds, for a request about to be admitted, a running one that is computing the blocks it needs next.

    A burst of requests with one system prompt arrives while nothing of it is cached. The first is admitted and
    becomes a leader; the others are parked as its followers, until the tree holds all that they share with it, or it
    ends.

    Why that costs nothing but the step: followers come after their leader in every plan, and prefill takes as many
    tokens of the budget as it can, so a follower would not have got the shared positions computed earlier itself. Why
    nobody waits forever: a leader is running, and whenever it stops running (finished, aborted, failed, preempted)
    its followers return to the queue.

    Leaders are found by content: the tokens up to and with the first block that the tree does not have from them.
    """

    def __init__(self, block_size: int, is_on: bool) -> None:
        self._block_size = block_size
        self._block_bytes = block_size * TOKEN_BYTES
        self._is_on = is_on
        self._leaders: dict[tuple[str, bytes], list[Request]] = {}

    def lead(self, request: Request) -> None:
        """A running request's computed blocks are in the tree now, up to table.num_inserted_blocks (it may be 0)."""
        self._forget(request)
        assert request.table is not None
        end = (request.table.num_inserted_blocks + 1) * self._block_bytes
        if self._is_on and end <= len(request.token_bytes):
            request.leader_key = (request.namespace, request.token_bytes[:end])
            self._leaders.setdefault(request.leader_key, []).append(request)

    def leader_for(self, request: Request, match: PrefixMatch) -> Request | None:
        """The running request that most is to be had from, if it is worth waiting for.

        Sets how many blocks `request` is to wait for.
        """
        tokens = request.matchable_bytes
        end = (len(match.path) + 1) * self._block_bytes
        if end >= len(tokens):
            return None
        best, most = None, 0
        for leader in self._leaders.get((request.namespace, tokens[:end]), ()):
            if leader.gives_way and not request.gives_way:
                continue  # it may be left out of many steps
            num_blocks = self._shared_blocks(leader.token_bytes, tokens[:-TOKEN_BYTES])
            if num_blocks > most:
                best, most = leader, num_blocks
        if most * self._block_size - match.num_tokens < MIN_SAVED_TOKENS:
            return None
        request.resume_blocks = most
        return best

    def follow(self, request: Request, leader: Request) -> None:
        if leader.followers is None:
            leader.followers = []
        leader.followers.append(request)

    def take_ready(self, leader: Request) -> list[Request]:
        """The followers for whom the leader has computed enough; they follow it no more. Ended ones are among them."""
        assert leader.followers is not None
        assert leader.table is not None
        num_blocks = leader.table.num_inserted_blocks
        ready = [request for request in leader.followers if request.resume_blocks <= num_blocks]
        if len(ready) == len(leader.followers):
            leader.followers = None
        else:
            leader.followers = [request for request in leader.followers if request.resume_blocks > num_blocks]
        return ready

    def leave(self, request: Request) -> list[Request]:
        """A request runs no more; returns its followers."""
        self._forget(request)
        followers, request.followers = request.followers, None
        return followers or []

    def _forget(self, request: Request) -> None:
        key, request.leader_key = request.leader_key, None
        if key is not None:
            leaders = self._leaders[key]
            leaders.remove(request)
            if not leaders:
                del self._leaders[key]

    def _shared_blocks(self, left: bytes, right: bytes) -> int:
        """Whole blocks that both start with, by bisection: comparing bytes costs far less than looping over tokens."""
        size = self._block_bytes
        low, high = 0, min(len(left), len(right)) // size
        while low < high:
            middle = (low + high + 1) // 2
            if left[low * size : middle * size] == right[low * size : middle * size]:
                low = middle
            else:
                high = middle - 1
        return low

    def check(self, running: list[Request]) -> None:
        """Asserts that leaders run, and that every follower behind one still has something to wait for."""
        for key, leaders in self._leaders.items():
            assert leaders, "an empty list was kept"
            for leader in leaders:
                assert leader.leader_key == key
                assert leader in running
        for request in running:
            for follower in request.followers or ():
                assert request.table is not None
                assert not follower.is_parked or follower.resume_blocks > request.table.num_inserted_blocks
