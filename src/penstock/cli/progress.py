"""A progress bar on standard error: drawn in place on a terminal, a line for every tenth elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Final, TextIO

WIDTH: Final = 40
REDRAW_S: Final = 0.1


class ProgressBar:
    """Counts up to `total`. num_done: what was there before, which says nothing about the speed."""

    def __init__(self, total: int, num_done: int = 0, stream: TextIO | None = None) -> None:
        self._total = max(1, total)
        self._stream = stream if stream is not None else sys.stderr
        self._is_terminal = self._stream.isatty()
        self._first = num_done
        self._count = num_done
        self._start_s = time.monotonic()
        self._drawn_s = 0.0
        self._tenths = self._count * 10 // self._total
        self._draw()

    def advance(self) -> None:
        self._count += 1
        now_s = time.monotonic()
        if self._is_terminal and now_s - self._drawn_s >= REDRAW_S:
            self._drawn_s = now_s
            self._draw()
        elif not self._is_terminal and self._count * 10 // self._total > self._tenths:
            self._tenths = self._count * 10 // self._total
            self._draw()

    def close(self) -> None:
        if self._is_terminal:
            self._draw()
            self._stream.write("\n")

    def _draw(self) -> None:
        line = self.line(time.monotonic())
        self._stream.write(f"\r\x1b[K{line}" if self._is_terminal else f"{line}\n")
        self._stream.flush()

    def line(self, now_s: float) -> str:
        """The bar as text."""
        share = min(1.0, self._count / self._total)
        new = self._count - self._first
        elapsed_s = now_s - self._start_s
        rate = f", {new / elapsed_s:.1f}/s" if new and elapsed_s > 0 else ""
        left = f", {(self._total - self._count) * elapsed_s / new:.0f} s left" if 0 < new < self._total else ""
        bar = "#" * round(share * WIDTH)
        return f"[{bar:<{WIDTH}}] {self._count}/{self._total}{rate}{left}"


class ShareBar:
    """The same for a share between 0 and 1 that somebody else counts."""

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self._name = name
        self._stream = stream if stream is not None else sys.stderr
        self._is_terminal = self._stream.isatty()
        self._drawn_s = 0.0
        self._tenths = 0

    def show(self, share: float) -> None:
        now_s = time.monotonic()
        is_due = now_s - self._drawn_s >= REDRAW_S if self._is_terminal else int(share * 10) > self._tenths
        if not is_due:
            return
        self._drawn_s, self._tenths = now_s, int(share * 10)
        bar = "#" * round(min(share, 1.0) * WIDTH)
        line = f"{self._name} [{bar:<{WIDTH}}] {share:.0%}"
        self._stream.write(f"\r\x1b[K{line}" if self._is_terminal else f"{line}\n")
        self._stream.flush()

    def close(self) -> None:
        if self._is_terminal:
            self._stream.write("\r\x1b[K")
