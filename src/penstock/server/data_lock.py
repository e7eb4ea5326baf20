"""One server for one data directory: two would answer the same batches and write over each other's responses.

Owns: a lock that ends with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from penstock.base.errors import PenstockError


class DataInUseError(PenstockError):
    code = "data_in_use"
    status = 503


class DataLock:
    """Holds the lock of one store, from its making until `release`."""

    def __init__(self, path: Path) -> None:
        """path: of the store; the lock is a file beside it. Raises DataInUseError when another server holds it."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise DataInUseError(
                "Another server on this machine keeps its files and responses in the same place.",
                remedy="Give each server its own --data-directory.",
            ) from None

    def release(self) -> None:
        os.close(self._file)
