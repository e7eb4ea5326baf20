"""Files and batches on disk: contents as plain files, everything else in one SQLite file.

A result is committed on its own, under the number of its line, so whatever ends the process, a line has one result or
none. Owns: both. One instance lives in one event loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from penstock.base.errors import PenstockError, ValidationError
from penstock.server.database import Database

MAX_FILES: Final = 10_000
MAX_TOTAL_BYTES: Final = 1 << 33
EXPIRES_AFTER_S: Final = 30 * 86_400.0

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, created_s REAL NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    size_bytes INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, created_s REAL NOT NULL, is_open INTEGER NOT NULL, body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS results (
    batch_id TEXT NOT NULL, line INTEGER NOT NULL, is_error INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (batch_id, line)
) WITHOUT ROWID;
"""


class UnknownFileError(PenstockError):
    code = "not_found"
    status = 404


@dataclass(frozen=True, slots=True)
class StoredFile:
    file_id: str
    created_s: float
    filename: str
    purpose: str
    size_bytes: int


class BatchStore:
    """Files, batches and the results so far."""

    def __init__(self, directory: Path, now_s: float) -> None:
        """directory: is made. now_s: seconds since 1970; files that are too old are deleted.

        Raises DataInUseError.
        """
        self._directory = directory / "files"
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._database = Database(directory / "batches.sqlite3", _SCHEMA)
        self._connection = self._database.connection
        old = now_s - EXPIRES_AFTER_S
        for (file_id,) in self._connection.execute("SELECT id FROM files WHERE created_s < ?", (old,)).fetchall():
            self.delete_file(file_id)
        self._connection.execute("DELETE FROM batches WHERE created_s < ? AND NOT is_open", (old,))

    def close(self) -> None:
        self._database.close()

    # Files

    def add_file(self, file: StoredFile, data: bytes) -> None:
        """Raises ValidationError when there is no room."""
        (count, total) = self._connection.execute("SELECT COUNT(*), COALESCE(SUM(size_bytes), 0) FROM files").fetchone()
        if count >= MAX_FILES or total + len(data) > MAX_TOTAL_BYTES:
            raise ValidationError(
                f"The server keeps {MAX_FILES} files of {MAX_TOTAL_BYTES >> 30} GiB at most.",
                remedy="Delete some.", param="file",
            )  # fmt: skip
        target = self._path(file.file_id)
        partial = target.with_suffix(".partial")
        partial.write_bytes(data)
        partial.replace(target)
        self._connection.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
            (file.file_id, file.created_s, file.filename, file.purpose, file.size_bytes),
        )

    def file(self, file_id: str) -> StoredFile:
        """Raises UnknownFileError."""
        row = self._connection.execute(
            "SELECT id, created_s, filename, purpose, size_bytes FROM files WHERE id = ?", (file_id,)
        ).fetchone()
        if row is None:
            raise UnknownFileError(f"There is no file {file_id[:100]!r}.")
        return StoredFile(*row)

    def files(self) -> list[StoredFile]:
        """Newest first."""
        rows = self._connection.execute(
            "SELECT id, created_s, filename, purpose, size_bytes FROM files ORDER BY created_s DESC, id DESC"
        )
        return [StoredFile(*row) for row in rows]

    def content(self, file_id: str) -> bytes:
        """Raises UnknownFileError."""
        self.file(file_id)
        return self._path(file_id).read_bytes()

    def delete_file(self, file_id: str) -> None:
        """Raises UnknownFileError."""
        self.file(file_id)
        self._connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self._path(file_id).unlink(missing_ok=True)

    def _path(self, file_id: str) -> Path:
        """file_id: one that the table holds, so it names nothing outside the directory."""
        return self._directory / file_id

    # Batches

    def put_batch(self, batch_id: str, body: dict[str, Any], *, is_open: bool) -> None:
        """Adds or replaces. is_open: there is work left on it."""
        self._connection.execute(
            "INSERT INTO batches VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET is_open = excluded.is_open, "
            "body = excluded.body",
            (batch_id, body["created_at"], is_open, msgspec.json.encode(body)),
        )

    def batch(self, batch_id: str) -> dict[str, Any]:
        """With the counts as of now. Raises UnknownFileError."""
        row = self._connection.execute("SELECT body FROM batches WHERE id = ?", (batch_id,)).fetchone()
        if row is None:
            raise UnknownFileError(f"There is no batch {batch_id[:100]!r}.")
        return self._counted(row[0])

    def batches(self, after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """Newest first, from behind `after`; whether there are more."""
        rows = self._connection.execute("SELECT id, body FROM batches ORDER BY created_s DESC, id DESC").fetchall()
        ids = [row[0] for row in rows]
        start = ids.index(after) + 1 if after in ids else 0
        return [self._counted(body) for _, body in rows[start : start + limit]], len(rows) > start + limit

    def open_batches(self) -> list[str]:
        """Oldest first."""
        rows = self._connection.execute("SELECT id FROM batches WHERE is_open ORDER BY created_s, id")
        return [row[0] for row in rows]

    def _counted(self, raw: bytes) -> dict[str, Any]:
        body: dict[str, Any] = msgspec.json.decode(raw)
        if body["output_file_id"] is None and body["error_file_id"] is None:
            (done, failed) = self._connection.execute(
                "SELECT COUNT(*), COALESCE(SUM(is_error), 0) FROM results WHERE batch_id = ?", (body["id"],)
            ).fetchone()
            body["request_counts"] |= {"completed": done - failed, "failed": failed}
        return body

    # Results

    def add_result(self, batch_id: str, line: int, body: bytes, *, is_error: bool) -> None:
        """The first result of a line stays."""
        self._connection.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?)", (batch_id, line, is_error, body))

    def finished_lines(self, batch_id: str) -> set[int]:
        return {row[0] for row in self._connection.execute("SELECT line FROM results WHERE batch_id = ?", (batch_id,))}

    def results(self, batch_id: str, *, is_error: bool) -> Iterator[bytes]:
        """In the order of the lines."""
        rows = self._connection.execute(
            "SELECT body FROM results WHERE batch_id = ? AND is_error = ? ORDER BY line", (batch_id, is_error)
        )
        return (row[0] for row in rows)

    def drop_results(self, batch_id: str) -> None:
        """Once they are in files."""
        self._connection.execute("DELETE FROM results WHERE batch_id = ?", (batch_id,))
