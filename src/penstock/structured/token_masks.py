"""Which tokens the constrained rows of a runner may draw next, worked out on a thread beside the model.

After a token is drawn its row's matcher goes on and makes the next mask while the model computes the next step; when
that step draws, the mask is waited for. A row depends on its own tokens alone, so masks and results are the same in
any batch.

Owns: the matchers of the rows and the thread that drives them.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from penstock.structured.closing import closing_path
from penstock.structured.compiler import CompiledGrammar

# A mask takes microseconds and the library's own limits end the worst within some milliseconds. Should one ever take
# longer than this, its request ends; the thread that is lost in it is left behind.
MAX_MASK_S: Final = 0.25
# The way to the end is looked for when so many draws are left beside it, and kept track of from there.
CLOSING_MARGIN: Final = 24
CLOSING_INTERVAL: Final = 8
INT32: Final = np.dtype(np.int32)


class ConstrainedRow:
    """One output in progress. Used by one thread at a time: the mask thread, or who waits for it.

    mask: bit i % 32 of word i // 32 is set where token i may come next. error: why there is no mask.
    budget: how many tokens may still be drawn; None when there is no limit to mind.
    """

    def __init__(self, grammar: CompiledGrammar, vocab_size: int, budget: int | None) -> None:
        self._matcher = grammar.matcher.copy()
        self._tokens = grammar.tokens
        self._closing_from = 2 * (grammar.num_closing_tokens or 0) + 2 * CLOSING_MARGIN
        self._path: list[int] | None = None
        self._is_path_current = False
        self._spare = np.zeros(-(-vocab_size // 32), dtype=INT32)
        self._num_drawn = 0
        self.last_token = -1
        self._is_over = False
        self.mask = np.zeros_like(self._spare)
        self.error = ""
        self.budget = budget

    @property
    def is_closing(self) -> bool:
        """Whether a drawn token is checked before it counts: the way to the end needs nearly all that is left."""
        if self.budget is None or self._is_over:
            return False
        return self.budget <= 1 or (self._path is not None and self.budget - len(self._path) <= CLOSING_MARGIN)

    @property
    def is_complete(self) -> bool:
        """Whether the output could end here."""
        return not self.error and self._matcher.is_complete()

    def advance(self, token_ids: Sequence[int], position: int) -> int:
        """Goes on by tokens of which the first stands at `position` of the output, and makes the next mask.

        Returns the last token, which is another one where the drawn one left no way to the end. A position that was
        advanced over before (a step that is computed again) changes nothing.
        """
        for offset, token_id in enumerate(token_ids):
            if position + offset < self._num_drawn:
                continue
            self.last_token = self._take(token_id)
            self._num_drawn += 1
        if not self.error:
            self._matcher.fill_mask(self.mask.ctypes.data, self.mask.nbytes)
            self.error = self._matcher.error()
        return self.last_token

    def _take(self, token_id: int) -> int:
        if self.error or self._is_over:
            return token_id
        is_closing = self.is_closing
        if is_closing and not self._is_path_current:
            self._find_path()
        before, was_complete = self._path, self._matcher.is_complete()
        if not self._matcher.consume(token_id):
            # What ends a sequence at a place where it may end is taken; anything else the mask has excluded.
            self.error = "" if was_complete else self._matcher.error() or "a token was drawn that the grammar excludes"
            self._is_over = True
            return token_id
        self._is_over = token_id in self._tokens.eos_token_ids
        if self.budget is None or self._is_over:
            return token_id
        self.budget -= 1
        self._follow(token_id)
        if is_closing and before is not None and (self._path is None or len(self._path) > self.budget):
            self._matcher.rollback(1)
            token_id = before[0] if before else self._tokens.eos_token_ids[0]
            self._matcher.consume(token_id)
            self._is_over = not before
            self._path, self._is_path_current = before[1:], True
        return token_id

    def _follow(self, token_id: int) -> None:
        """The way to the end after a token was taken; looked for anew where it counts, and now and then before."""
        if self._path and self._is_path_current and self._path[0] == token_id:
            self._path = self._path[1:]
            return
        self._is_path_current = False
        assert self.budget is not None
        is_due = self._path is None or self._num_drawn % CLOSING_INTERVAL == 0
        if self.is_closing or (is_due and self.budget <= self._closing_from):
            self._find_path()

    def _find_path(self) -> None:
        """A way to the end from here: the one known, if it still leads there."""
        if self._path is None or not self._leads_to_end(self._path):
            assert self.budget is not None
            self._path = closing_path(self._matcher, self._tokens, self._spare, max(self.budget, 1))
        self._is_path_current = True

    def _leads_to_end(self, path: list[int]) -> bool:
        if not self._matcher.accepts_all(path):
            return False
        for token_id in path:
            self._matcher.consume(token_id)
        is_complete = self._matcher.is_complete()
        if path:
            self._matcher.rollback(len(path))
        return is_complete


class _Job:
    """Rows to advance, one after another. index: the one being worked on."""

    __slots__ = ("done", "index", "work")

    def __init__(self, work: list[tuple[ConstrainedRow, Sequence[int], int]]) -> None:
        self.work = work
        self.index = 0
        self.done = threading.Event()


class _MaskThread:
    """Works off jobs in order. Left behind, it ends after the row it is at."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_left = False
        threading.Thread(target=self._run, name="token-masks", daemon=True).start()

    def put(self, job: _Job | None) -> None:
        self._jobs.put(job)

    def leave(self, job: _Job) -> int | None:
        """Gives the thread up; the index of the row it is lost in. None: it has finished after all, and is kept."""
        with self._lock:
            if job.done.is_set():
                return None
            self._is_left = True
            return job.index

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            for row, token_ids, position in job.work:
                try:
                    row.advance(token_ids, position)
                except Exception as error:  # a fault of the library ends the request that met it, not the thread
                    row.error = f"the grammar library failed ({type(error).__name__})"
                with self._lock:
                    if self._is_left:
                        return
                    job.index += 1
                    if job.index == len(job.work):
                        job.done.set()


class TokenMasks:
    """The constrained rows of one runner, by row number."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: dict[int, ConstrainedRow] = {}
        self._thread: _MaskThread | None = None
        self._pending: list[_Job] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def add(self, row: int, grammar: CompiledGrammar, output_ids: Sequence[int], budget: int | None) -> None:
        """A request takes `row`. output_ids: what it drew before a preemption. budget: of its whole output."""
        constrained = ConstrainedRow(grammar, self._vocab_size, budget)
        self._rows[row] = constrained
        self._submit([(constrained, list(output_ids), 0)])

    def remove(self, row: int) -> None:
        self._rows.pop(row, None)

    def masks(self, rows: Sequence[int]) -> tuple[list[int], NDArray[np.int32]] | None:
        """(indices into `rows` of the constrained ones, their masks [K, words]); None when there is none."""
        indices = [index for index, row in enumerate(rows) if row in self._rows]
        if not indices:
            return None
        self._wait()
        found = [self._rows[rows[index]] for index in indices]
        return indices, np.stack([row.mask if not row.error else np.zeros_like(row.mask) for row in found])

    def advance(self, rows: Sequence[int], token_ids: list[int], positions: Sequence[int]) -> list[int]:
        """Takes the tokens that rows drew at these positions of their outputs; those that count, in their place.

        Rows whose token is negative drew none. Waits only where a token may be replaced.
        """
        work: list[tuple[ConstrainedRow, Sequence[int], int]] = []
        checked: list[tuple[int, ConstrainedRow]] = []
        for index, row in enumerate(rows):
            constrained = self._rows.get(row)
            if constrained is not None and token_ids[index] >= 0:
                work.append((constrained, (token_ids[index],), positions[index]))
                if constrained.is_closing:
                    checked.append((index, constrained))
        if not work:
            return token_ids
        self._submit(work)
        if checked:
            self._wait()
            token_ids = list(token_ids)
            for index, constrained in checked:
                token_ids[index] = constrained.last_token
        return token_ids

    def is_complete(self, row: int) -> bool:
        """Whether the row's output is whole. Only for rows whose budget is spent: others may be at work."""
        constrained = self._rows.get(row)
        return constrained is not None and constrained.budget == 0 and constrained.is_complete

    def error(self, row: int) -> str:
        """Why a row has no mask; empty when it has one, or is free."""
        constrained = self._rows.get(row)
        return constrained.error if constrained is not None else ""

    def _submit(self, work: list[tuple[ConstrainedRow, Sequence[int], int]]) -> None:
        if self._thread is None:
            self._thread = _MaskThread()
            weakref.finalize(self, self._thread.put, None)
        job = _Job(work)
        self._pending.append(job)
        self._thread.put(job)

    def _wait(self) -> None:
        """Until all rows are up to date. A row that takes too long gets an error, and a new thread does the rest."""
        while self._pending:
            job = self._pending[0]
            if not job.done.wait(MAX_MASK_S):
                self._leave_behind(job)
                continue
            del self._pending[0]

    def _leave_behind(self, job: _Job) -> None:
        assert self._thread is not None
        lost = self._thread.leave(job)
        if lost is None:
            return
        stuck = job.work[lost][0]
        stuck.error = "its next token takes too long to work out"
        rest = [*job.work[lost + 1 :], *(work for later in self._pending[1:] for work in later.work)]
        self._pending.clear()
        self._thread = None
        if rest := [work for work in rest if work[0] is not stuck]:
            self._submit(rest)
