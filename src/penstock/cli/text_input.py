"""Text files that a command is given: to score, or to calibrate on."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from penstock.base.errors import ConfigError

MAX_TEXT_BYTES: Final = 256 << 20


def read_text(path: Path) -> str:
    """The whole file. Raises ConfigError for one that is too large, or no UTF-8."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_TEXT_BYTES >> 20} MiB.", remedy="Take a part of it.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The text {path} cannot be read: {error}.", remedy="Name a UTF-8 text file.") from error
