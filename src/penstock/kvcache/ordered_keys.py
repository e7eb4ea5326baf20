"""A sorted set of byte strings, for finding the key that shares the longest prefix with a query."""

from __future__ import annotations

from bisect import bisect_left, insort

_MAX_CHUNK = 512


class OrderedKeys:
    """Adds, removes and finds neighbours in O(log n) comparisons, however many keys there are.

    The keys lie in chunks of at most _MAX_CHUNK, because inserting into one long list moves half of it.
    In a sorted set the longest common prefix with any query is had by one of the query's two neighbours.
    """

    __slots__ = ("_chunks", "_lasts")

    def __init__(self, keys: list[bytes]) -> None:
        self._chunks: list[list[bytes]] = [sorted(keys)]
        self._lasts: list[bytes] = [self._chunks[0][-1]]

    def add(self, key: bytes) -> None:
        index = min(bisect_left(self._lasts, key), len(self._lasts) - 1)
        chunk = self._chunks[index]
        insort(chunk, key)
        if len(chunk) > _MAX_CHUNK:
            half = len(chunk) // 2
            self._chunks[index : index + 1] = [chunk[:half], chunk[half:]]
            self._lasts[index : index + 1] = [chunk[half - 1], chunk[-1]]
        else:
            self._lasts[index] = chunk[-1]

    def remove(self, key: bytes) -> None:
        """Removes a key that is there. The set may become empty only for good: add() needs one key."""
        index = bisect_left(self._lasts, key)
        chunk = self._chunks[index]
        del chunk[bisect_left(chunk, key)]
        if chunk:
            self._lasts[index] = chunk[-1]
        else:
            del self._chunks[index], self._lasts[index]

    def neighbours(self, query: bytes) -> list[bytes]:
        """The last key below `query` and the first one at or above it, as far as they exist."""
        found: list[bytes] = []
        index = bisect_left(self._lasts, query)
        position = 0
        if index < len(self._chunks):
            chunk = self._chunks[index]
            position = bisect_left(chunk, query)
            found.append(chunk[position])
        if position > 0:
            found.append(self._chunks[index][position - 1])
        elif index > 0:
            found.append(self._lasts[index - 1])
        return found

    def to_list(self) -> list[bytes]:
        """All keys in order; for checks."""
        return [key for chunk in self._chunks for key in chunk]
