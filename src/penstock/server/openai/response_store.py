"""Where responses are kept: one SQLite file, bounded in rows, bytes and time.

Owns: the file. One instance lives in one event loop; a call takes well under a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from penstock.base.errors import PenstockError
from penstock.server.database import Database

EXPIRES_AFTER_S: Final = 30 * 86_400.0  # OpenAI's
MAX_ROWS: Final = 100_000
MAX_BYTES: Final = 1 << 30
_CLEAN_EVERY: Final = 64  # writes

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, created_s REAL NOT NULL, size_bytes INTEGER NOT NULL, is_done INTEGER NOT NULL,
    body BLOB NOT NULL, input BLOB NOT NULL, messages BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS responses_by_time ON responses (created_s);
"""


class UnknownResponseError(PenstockError):
    code = "response_not_found"
    status = 404


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """body: the response object. input: the input items. messages: the conversation so far, in the template's shape.

    All three are JSON. is_done: nothing works on it any more.
    """

    response_id: str
    body: bytes
    input: bytes
    messages: bytes
    is_done: bool = True


class ResponseStore:
    """Responses by id. What is older than EXPIRES_AFTER_S, or beyond the bounds, is deleted, oldest first."""

    def __init__(self, path: Path, now_s: float) -> None:
        """path: of the SQLite file; its directory is made. now_s: seconds since 1970. Raises DataInUseError."""
        self._database = Database(path, _SCHEMA)
        self._connection = self._database.connection
        self._num_writes = 0
        self._fail_unfinished()
        self.clean(now_s)

    def put(self, response: StoredResponse, created_s: float) -> None:
        """Adds or replaces."""
        size_bytes = len(response.body) + len(response.input) + len(response.messages)
        self._connection.execute(
            "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                response.response_id, created_s, size_bytes, response.is_done, response.body, response.input,
                response.messages,
            ),
        )  # fmt: skip
        self._num_writes += 1
        if self._num_writes % _CLEAN_EVERY == 0:
            self.clean(created_s)

    def get(self, response_id: str, now_s: float) -> StoredResponse:
        """Raises UnknownResponseError."""
        row = self._connection.execute(
            "SELECT id, body, input, messages, is_done FROM responses WHERE id = ? AND created_s > ?",
            (response_id, now_s - EXPIRES_AFTER_S),
        ).fetchone()
        if row is None:
            raise UnknownResponseError(
                f"There is no response {response_id[:100]!r}.", remedy="It was not stored, was deleted, or has expired."
            )
        return StoredResponse(row[0], row[1], row[2], row[3], bool(row[4]))

    def has(self, response_id: str) -> bool:
        """Whether the row is there, expired or not."""
        row = self._connection.execute("SELECT 1 FROM responses WHERE id = ?", (response_id,)).fetchone()
        return row is not None

    def delete(self, response_id: str, now_s: float) -> None:
        """Raises UnknownResponseError."""
        self.get(response_id, now_s)
        self._connection.execute("DELETE FROM responses WHERE id = ?", (response_id,))

    def clean(self, now_s: float) -> None:
        """Deletes what has expired and what exceeds the bounds."""
        connection = self._connection
        connection.execute("DELETE FROM responses WHERE created_s <= ?", (now_s - EXPIRES_AFTER_S,))
        (total, rows) = connection.execute("SELECT COALESCE(SUM(size_bytes), 0), COUNT(*) FROM responses").fetchone()
        while total > MAX_BYTES or rows > MAX_ROWS:
            oldest = connection.execute("SELECT id, size_bytes FROM responses ORDER BY created_s LIMIT 100").fetchall()
            connection.executemany("DELETE FROM responses WHERE id = ?", [(row[0],) for row in oldest])
            total -= sum(row[1] for row in oldest)
            rows -= len(oldest)

    def close(self) -> None:
        self._database.close()

    def _fail_unfinished(self) -> None:
        """What a server that ended was still working on has failed."""
        rows = self._connection.execute("SELECT id, body FROM responses WHERE NOT is_done").fetchall()
        for response_id, body in rows:
            response = msgspec.json.decode(body)
            response["status"] = "failed"
            response["error"] = {
                "code": "server_error",
                "message": "The server ended before it was complete.",
            }
            self._connection.execute(
                "UPDATE responses SET body = ?, is_done = 1 WHERE id = ?", (msgspec.json.encode(response), response_id)
            )
