"""An SQLite file that belongs to one server: two would answer the same batches and write over each other's responses.

Owns: the file, by a lock that ends with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from penstock.base.errors import PenstockError


class DataInUseError(PenstockError):
    code = "data_in_use"
    status = 503


class Database:
    """An open database. A commit survives the end of the process, though perhaps not that of the machine."""

    def __init__(self, path: Path, schema: str) -> None:
        """path: of the file; its directory is made, for this user alone. schema: makes the tables that are missing.

        Raises DataInUseError when another server has it open.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise DataInUseError(
                "Another server on this machine keeps its files and responses in the same place.",
                remedy="Give each server its own --data-directory.",
            ) from None
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = NORMAL")
        self.connection.executescript(schema)
        path.chmod(0o600)

    def close(self) -> None:
        self.connection.close()
        os.close(self._lock)
