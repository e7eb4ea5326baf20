"""Which tokens the constrained rows of a runner may draw next, worked out on a thread beside the model.

After a token is drawn its row's matcher goes on and makes the next mask while the model computes the next step; when
that step draws, the mask is waited for. A row depends on its own tokens alone, so masks and results are the same in
any batch.

Owns: the matchers of the rows and the thread that drives them.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from penstock.structured.backend import MatcherBatch
from penstock.structured.compiler import CompiledGrammar
from penstock.structured.constrained_row import ConstrainedRow
from penstock.structured.llguidance_backend import LlguidanceBatch

# A mask takes microseconds and the library's own limits end the worst within some milliseconds. Should one ever take
# longer than this, its request ends; the thread that is lost in it is left behind.
MAX_MASK_S: Final = 0.25
# A jump over fewer tokens saves no step: when it is known, the step for the first of them is planned.
MIN_JUMP: Final = 3

# (row, tokens to take, position of the first in its output)
Work = tuple[ConstrainedRow, Sequence[int], int]


class _Job:
    """Rows to advance. is_single: one after another, of which `index` is being worked on."""

    __slots__ = ("done", "index", "is_single", "work")

    def __init__(self, work: list[Work], *, is_single: bool = False) -> None:
        self.work = work
        self.is_single = is_single
        self.index = 0
        self.done = threading.Event()

    def from_beginnings(self) -> _Job:
        """The same with whole outputs, one row after another."""
        work = [(row, [*row.token_ids[:position], *token_ids], 0) for row, token_ids, position in self.work]
        return _Job(list(work), is_single=True)

    def with_rows(self, renewed: Mapping[ConstrainedRow, ConstrainedRow]) -> _Job:
        """The same with some rows in the place of others."""
        work = [(renewed.get(row, row), token_ids, position) for row, token_ids, position in self.work]
        return _Job(work, is_single=self.is_single)


class _LeftBehindError(Exception):
    """Nobody waits for this thread any more."""


class _MaskThread:
    """Works off jobs in order. Left behind, it touches no row any more and ends."""

    def __init__(self, masks: NDArray[np.int32], batch: MatcherBatch) -> None:
        self._masks = masks
        self._batch = batch
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_left = False
        threading.Thread(target=self._run, name="token-masks", daemon=True).start()

    def put(self, job: _Job | None) -> None:
        self._jobs.put(job)

    def leave(self, job: _Job) -> bool:
        """Gives the thread up; False where the job has been finished after all, and the thread is kept."""
        with self._lock:
            self._is_left = not job.done.is_set()
            return self._is_left

    def _run(self) -> None:
        with contextlib.suppress(_LeftBehindError):
            while (job := self._jobs.get()) is not None:
                try:
                    self._work(job)
                except _LeftBehindError:
                    raise
                except Exception:  # a fault of the library: the row it comes from is found one by one
                    again = job.from_beginnings()
                    for row, _, _ in again.work:
                        row.restart()
                    self._work(again)
                with self._if_not_left():
                    job.done.set()

    @contextlib.contextmanager
    def _if_not_left(self) -> Iterator[None]:
        with self._lock:
            if self._is_left:
                raise _LeftBehindError
            yield

    def _work(self, job: _Job) -> None:
        if not job.is_single:
            self._work_together(job.work)
            return
        for row, token_ids, position in job.work:
            try:
                row.advance(token_ids, position)
                row.fill_mask()
            except Exception as error:
                row.error = f"the grammar library failed ({type(error).__name__})"
            with self._if_not_left():
                job.index += 1

    def _work_together(self, work: list[Work]) -> None:
        """Two calls of the library for all rows that take one token each, far from the end of their budgets."""
        batched: list[ConstrainedRow] = []
        drawn: list[int] = []
        for row, token_ids, position in work:
            if len(token_ids) == 1 and row.takes_in_batch(token_ids[0], position):
                batched.append(row)
                drawn.append(token_ids[0])
            else:
                row.advance(token_ids, position)
        if batched:
            accepted = self._batch.consume([row.matcher for row in batched], drawn)
            with self._if_not_left():
                for row, token_id, is_accepted in zip(batched, drawn, accepted, strict=True):
                    row.took(token_id, is_accepted)
        wanted = [row for row, _, _ in work if row.look_ahead()]
        if wanted:
            self._batch.fill_masks([row.matcher for row in wanted], [row.slot for row in wanted], self._masks)
            with self._if_not_left():
                for row in wanted:
                    row.error = row.matcher.error()


class TokenMasks:
    """The constrained rows of one runner, by row number."""

    def __init__(self, vocab_size: int, max_rows: int, batch: MatcherBatch | None = None) -> None:
        """batch: for the matchers of all grammars."""
        self.jumps = True  # whether forced tokens are given out at once, where a row lets them
        self._masks = np.zeros((max_rows, -(-vocab_size // 32)), dtype=np.int32)
        self._batch = batch
        self._rows: dict[int, ConstrainedRow] = {}
        self._thread: _MaskThread | None = None
        self._pending: list[_Job] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def add(
        self, row: int, grammar: CompiledGrammar, output_ids: Sequence[int], budget: int | None, *, jumps: bool = True
    ) -> None:
        """A request takes `row`. output_ids: what it drew before a preemption. budget: of its whole output.
        jumps: nothing but the grammar decides about a token that it forces, and nobody asks for its probability."""
        min_jump = self._min_jump if jumps and self.jumps else None
        constrained = ConstrainedRow(grammar, self._masks[row], row, budget, min_jump)
        self._rows[row] = constrained
        self._submit(_Job([(constrained, list(output_ids), 0)]))

    def _min_jump(self) -> int:
        """A jump voids the draw that is planned for its first token already. Alone, that costs nothing where weights
        are read anyway; among many rows, it costs what a token costs, and only a long jump is worth it."""
        return max(MIN_JUMP, len(self._rows) // 2)

    def remove(self, row: int) -> None:
        self._rows.pop(row, None)

    def masks(self, rows: Sequence[int]) -> tuple[list[int], NDArray[np.int32]] | None:
        """(indices into `rows` of the constrained ones, their masks [K, words]); None when there is none."""
        indices = [index for index, row in enumerate(rows) if row in self._rows]
        if not indices:
            return None
        self._wait()
        chosen = [rows[index] for index in indices]
        masks = self._masks[chosen]
        if any(row.error for row in self._rows.values()):
            masks[[index for index, row in enumerate(chosen) if self._rows[row].error]] = 0
        return indices, masks

    def jumps_of(self, rows: Sequence[int]) -> dict[int, list[int]]:
        """By index into `rows`: tokens that a row goes on with and that need no draw, where there are some."""
        self._wait()
        found: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            constrained = self._rows.get(row)
            if constrained is not None and constrained.jump:
                found[index] = constrained.jump
        return found

    def advance(self, rows: Sequence[int], token_ids: list[int], positions: Sequence[int]) -> list[int]:
        """Takes the tokens that rows drew at these positions of their outputs; those that count, in their place.

        Rows whose token is negative drew none. Waits only where a token may be replaced.
        """
        work: list[Work] = []
        checked: list[tuple[int, ConstrainedRow]] = []
        for index, row in enumerate(rows):
            constrained = self._rows.get(row)
            if constrained is not None and token_ids[index] >= 0:
                work.append((constrained, (token_ids[index],), positions[index]))
                if constrained.is_closing:
                    checked.append((index, constrained))
        if not work:
            return token_ids
        self._submit(_Job(work))
        if checked:
            self._wait()
            token_ids = list(token_ids)
            for index, constrained in checked:
                token_ids[index] = constrained.token_ids[positions[index]]
        return token_ids

    def jump(self, jumps: Sequence[tuple[int, Sequence[int], int]]) -> None:
        """Takes what jumps_of() gave, each as (row, tokens, position of the first in the output)."""
        self._submit(_Job([(self._rows[row], token_ids, position) for row, token_ids, position in jumps]))

    def is_complete(self, row: int) -> bool:
        """Whether the row's output is whole. Only for rows whose budget is spent: others may be at work."""
        constrained = self._rows.get(row)
        return constrained is not None and constrained.budget == 0 and constrained.is_complete

    def error(self, row: int) -> str:
        """Why a row has no mask; empty when it has one, or is free."""
        constrained = self._rows.get(row)
        return constrained.error if constrained is not None else ""

    def _submit(self, job: _Job) -> None:
        if self._thread is None:
            if self._batch is None:
                self._batch = LlguidanceBatch()
            self._thread = _MaskThread(self._masks, self._batch)
            weakref.finalize(self, self._thread.put, None)
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
        """Goes on without a thread that may never come back, and without all that it may still write to."""
        assert self._thread is not None
        if not self._thread.leave(job):
            return
        self._masks = self._masks.copy()
        self._batch = self._thread = None
        for row, constrained in self._rows.items():
            constrained.set_mask(self._masks[row])
        later, self._pending = self._pending[1:], []
        if job.is_single:
            stuck = job.work[job.index][0]
            again = _Job(job.work[job.index + 1 :], is_single=True)
            renewed = {stuck: stuck.renewed(self._masks[stuck.slot])}
            renewed[stuck].error = "its next token takes too long to work out"
        else:
            again = job.from_beginnings()
            renewed = {row: row.renewed(self._masks[row.slot]) for row, _, _ in job.work}
        for row, constrained in self._rows.items():
            self._rows[row] = renewed.get(constrained, constrained)
        for one in (again, *later):
            self._submit(one.with_rows(renewed))
