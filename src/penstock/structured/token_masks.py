"""Which tokens the constrained rows of a runner may draw next; masks are made on a thread beside the model.

A drawn token is taken at once: microseconds, less than handing it to a thread and waiting for the interpreter's lock.
Masks, and all that may take long, are left to the thread: it makes them while the model computes the next step, and
when that step draws, they are waited for. A row depends on its own tokens alone, so masks and results are the same in
any batch.

Owns: the matchers of the rows and the thread that makes masks.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
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
# longer than this of a processor, its request ends; the thread that is lost in it is left behind. On a busy machine the
# thread may wait for a processor meanwhile: a row that has not used much of one is given MAX_WAITS times as long.
MAX_MASK_S: Final = 0.25
MAX_WAITS: Final = 20
# A jump over fewer tokens saves no step: when it is known, the step for the first of them is planned.
MIN_JUMP: Final = 3

# (row, tokens that it has not taken yet, position of the first in its output)
Work = tuple[ConstrainedRow, Sequence[int], int]


class _Job:
    """Rows that need masks. is_single: one after another, of which `index` is being worked on. is_done: released once;
    an Event costs several times as much as a lock."""

    __slots__ = ("index", "is_done", "is_single", "work")

    def __init__(self, work: list[Work], *, is_single: bool = False) -> None:
        self.work = work
        self.is_single = is_single
        self.index = 0
        self.is_done = threading.Lock()
        self.is_done.acquire()

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
    """Works off jobs in order, and is alone in writing masks. Left behind, it touches no row any more and ends."""

    def __init__(self, masks: NDArray[np.int32], batch: MatcherBatch) -> None:
        self._masks = masks
        self._batch = batch
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_left = False
        thread = threading.Thread(target=self._run, name="token-masks", daemon=True)
        thread.start()
        assert thread.ident is not None
        self._clock = time.pthread_getcpuclockid(thread.ident)

    def put(self, job: _Job | None) -> None:
        self._jobs.put(job)

    def finishes(self, job: _Job) -> bool:
        """Waits. False where it takes too long: the row that is worked on, or the rows that are worked on together."""
        if job.is_done.acquire(blocking=False):  # the usual case: made while the model computed
            return True
        index, used_s = job.index, time.clock_gettime(self._clock)
        waits = 0
        while not job.is_done.acquire(timeout=MAX_MASK_S):
            now_s = time.clock_gettime(self._clock)
            waits = 0 if job.index > index else waits + 1
            if not job.is_single or waits == MAX_WAITS or (waits and now_s - used_s > MAX_MASK_S / 2):
                return False
            if not waits:
                index, used_s = job.index, now_s
        return True

    def leave(self, job: _Job) -> bool:
        """Gives the thread up; False where the job has been finished after all, and the thread is kept."""
        with self._lock:
            self._is_left = job.is_done.locked()
            return self._is_left

    def _run(self) -> None:
        with contextlib.suppress(_LeftBehindError):
            while (job := self._jobs.get()) is not None:
                if job.is_single:
                    self._work_one_by_one(job)
                else:
                    self._work_together(job.work)
                with self._if_not_left():
                    job.is_done.release()

    @contextlib.contextmanager
    def _if_not_left(self) -> Iterator[None]:
        with self._lock:
            if self._is_left:
                raise _LeftBehindError
            yield

    def _work_together(self, work: list[Work]) -> None:
        """One call of the library for the masks of all rows where something is to choose."""
        for row, token_ids, position in work:
            if token_ids:
                _advance(row, token_ids, position)
        choosing = [row for row, _, _ in work if not row.mask_known()]
        if not choosing:
            return
        try:
            self._batch.fill_masks([row.matcher for row in choosing], [row.slot for row in choosing], self._masks)
        except Exception:  # the row that it comes from is found one by one
            for row in choosing:
                _fill_mask(row)
            return
        with self._if_not_left():
            for row in choosing:
                row.check()

    def _work_one_by_one(self, job: _Job) -> None:
        for row, token_ids, position in job.work:
            _advance(row, token_ids, position)
            _fill_mask(row)
            with self._if_not_left():
                job.index += 1


def _advance(row: ConstrainedRow, token_ids: Sequence[int], position: int) -> None:
    try:
        row.advance(token_ids, position)
    except Exception as error:
        row.fail(error)


def _take(row: ConstrainedRow, token_id: int, position: int) -> bool:
    try:
        return row.take(token_id, position)
    except Exception as error:
        row.fail(error)
        return True


def _fill_mask(row: ConstrainedRow) -> None:
    try:
        row.fill_mask()
    except Exception as error:
        row.fail(error)


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
        return indices, self._masks[chosen]

    def jumps_of(self, rows: Sequence[int]) -> dict[int, list[int]]:
        """By index into `rows`: tokens that a row goes on with and that need no draw, where there are some."""
        self._wait()
        constrained = self._rows
        return {
            index: constrained[row].jump
            for index, row in enumerate(rows)
            if row in constrained and constrained[row].jump
        }

    def advance(self, rows: Sequence[int], token_ids: list[int], positions: Sequence[int]) -> list[int]:
        """Takes the tokens that rows drew at these positions of their outputs; those that count, in their place.

        Rows whose token is negative drew none. Waits only where a token may be replaced.
        """
        self._wait()  # for masks that nobody asked for
        work: list[Work] = []
        checked: list[int] = []
        for index, (row, token_id, position) in enumerate(zip(rows, token_ids, positions, strict=True)):
            constrained = self._rows.get(row)
            if constrained is None or token_id < 0:
                continue
            if _take(constrained, token_id, position):
                work.append((constrained, (), position + 1))
            else:
                work.append((constrained, (token_id,), position))
                if constrained.is_closing:
                    checked.append(index)
        if work:
            self._submit(_Job(work))
        if checked:
            self._wait()
            token_ids = list(token_ids)
            for index in checked:
                token_ids[index] = self._rows[rows[index]].token_ids[positions[index]]
        return token_ids

    def jump(self, jumps: Sequence[tuple[int, Sequence[int], int]]) -> None:
        """Takes what jumps_of() gave, each as (row, tokens, position of the first in the output)."""
        self._submit(_Job([(self._rows[row], token_ids, position) for row, token_ids, position in jumps]))

    def is_complete(self, row: int) -> bool:
        """Whether the row's output is whole. Only for rows whose budget is spent: others may be at work."""
        constrained = self._rows.get(row)
        return constrained is not None and constrained.is_complete

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
        """Until all masks are there. A row that takes too long gets an error, and a new thread does the rest."""
        while self._pending:
            assert self._thread is not None
            job = self._pending[0]
            if self._thread.finishes(job):
                del self._pending[0]
            else:
                self._leave_behind(job)

    def _leave_behind(self, job: _Job) -> None:
        """Goes on without a thread that may never come back, and without all that it may still write to."""
        assert self._thread is not None
        if not self._thread.leave(job):
            return
        self._masks = self._masks.copy()
        self._batch = self._thread = None
        later, self._pending = self._pending[1:], []
        if job.is_single:
            stuck = job.work[job.index][0]
            again = _Job(job.work[job.index + 1 :], is_single=True)
            renewed = {stuck: stuck.renewed(self._masks[stuck.slot])}
            renewed[stuck].fail("its next token takes too long to work out")
        else:
            again = job.from_beginnings()
            renewed = {row: row.renewed(self._masks[row.slot]) for row, _, _ in job.work}
        for row, constrained in self._rows.items():
            if constrained in renewed:  # the thread may still write where the old one's mask stands
                self._rows[row] = renewed[constrained]
            else:
                constrained.set_mask(self._masks[row])
        for one in (again, *later):
            self._submit(one.with_rows(renewed))
