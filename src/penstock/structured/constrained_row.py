"""One output in progress: its matcher, the text that is forced on it, and its end inside its budget.

Forced text: where the grammar leaves one text only, its tokens are those of the model's own tokenizer (`forced`), and
each of them is the only one that its mask allows. So it makes no difference to an output whether they are drawn one by
one, or given out at once (jump-forward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from penstock.structured.closing import closing_path
from penstock.structured.compiler import CompiledGrammar

# The way to the end is looked for when so many draws are left beside it, and kept track of from there.
CLOSING_MARGIN: Final = 24
CLOSING_INTERVAL: Final = 8
_NO_LIMIT: Final = 1 << 60
_BITS: Final = (np.uint32(1) << np.arange(32, dtype=np.uint32)).view(np.int32)


class ConstrainedRow:
    """Used by one thread at a time: the mask thread where it has a job for the row, else who drives the rows.

    mask: bit i % 32 of word i // 32 is set where token i may come next; not kept up while there is a jump. forced: the
    tokens that come next. jump: the same where they are given out at once, else empty. error: why nothing may be
    drawn. is_complete: the output is as long as it may be, and could end here. slot: of the mask, among those of all.
    """

    def __init__(
        self,
        grammar: CompiledGrammar,
        mask: NDArray[np.int32],
        slot: int,
        budget: int | None,
        min_jump: Callable[[], int] | None,
    ) -> None:
        """budget: None where there is no limit to mind. min_jump: how many forced tokens are given out at once, at the
        least; None: they are all drawn."""
        self.grammar = grammar
        self.slot = slot
        self._min_jump = min_jump
        self._budget = budget
        self._limit = _NO_LIMIT if budget is None else budget
        self._closing_from = 2 * (grammar.num_closing_tokens or 0) + 2 * CLOSING_MARGIN
        self._eos_token_ids = frozenset(grammar.tokens.eos_token_ids)
        self._spare: NDArray[np.int32] | None = None
        self.set_mask(mask)
        self.restart()

    def set_mask(self, mask: NDArray[np.int32]) -> None:
        """Where the mask stands from now on; what it holds does not change."""
        self.mask = mask
        self._address = mask.ctypes.data

    def renewed(self, mask: NDArray[np.int32]) -> ConstrainedRow:
        """The same row at the beginning of its output, sharing nothing with this one."""
        return ConstrainedRow(self.grammar, mask, self.slot, self._budget, self._min_jump)

    def restart(self) -> None:
        """Back to the beginning of the output."""
        self.matcher = self.grammar.matcher.copy()
        self._consume, self._forced_tokens = self.matcher.consume, self.matcher.forced_tokens
        self.forced: list[int] = []
        self.jump: list[int] = []
        self.token_ids: list[int] = []
        self.error = ""
        self._plain_to = self._limit - 1 - self._closing_from
        self.is_over = self.is_complete = False
        self._path: list[int] | None = None
        self._is_path_current = False

    def fail(self, why: str | Exception) -> None:
        """Leaves nothing to draw. why: or a fault of the library."""
        self.error = why if isinstance(why, str) else f"the grammar library failed ({type(why).__name__})"
        self.jump = []
        self._plain_to = 0
        self.mask.fill(0)

    @property
    def budget(self) -> int:
        """How many tokens may still be drawn."""
        return self._limit - len(self.token_ids)

    @property
    def is_closing(self) -> bool:
        """Whether a drawn token is checked before it counts: the way to the end needs nearly all that is left."""
        if self.is_over:
            return False
        return self.budget <= 1 or (self._path is not None and self.budget - len(self._path) <= CLOSING_MARGIN)

    def take(self, token_id: int, position: int) -> bool:
        """Goes on by the token that was drawn at `position`, and finds out what is forced then: microseconds. False,
        and nothing is changed, where more is to be looked at (near the end, say): then `advance` does it."""
        # Done for every row of a step, which takes two milliseconds for a small model: each line counts.
        token_ids = self.token_ids
        if not len(token_ids) == position < self._plain_to or token_id in self._eos_token_ids:
            return False
        token_ids.append(token_id)
        if not self._consume(token_id):
            self._refuse()
        elif not (self.forced and self._pop_forced(token_id) and self.forced):
            forced = self._forced_tokens()
            if forced:
                self._set_forced(forced)
        return True

    def advance(self, token_ids: Sequence[int], position: int) -> None:
        """Goes on by tokens of which the first stands at `position` of the output. The last of them is afterwards
        another one (token_ids[-1]) where the drawn one left no way to the end. A position that was advanced over
        before (a step that is computed again) changes nothing.
        """
        if not self.token_ids:
            self._look_ahead()
        token_ids = token_ids[max(0, len(self.token_ids) - position) :]
        if len(token_ids) > 1 and token_ids == self.forced and len(self.token_ids) + len(token_ids) <= self._plain_to:
            self._take_forced()
            return
        for token_id in token_ids:
            if self.error or self.is_over:
                self.token_ids.append(token_id)
            elif not self.take(token_id, len(self.token_ids)):
                self._take_near_end(token_id)
                self._look_ahead()

    def mask_known(self) -> bool:
        """Writes the mask where there is nothing to choose. False: it has to be filled from the matcher."""
        if self.forced and not self.jump:
            self.mask.fill(0)
            token_id = self.forced[0]
            self.mask[token_id >> 5] = _BITS[token_id & 31]
        return bool(self.forced or self.is_over or self.error)

    def fill_mask(self) -> None:
        if not self.mask_known():
            self.matcher.fill_mask(self._address, self.mask.nbytes)
            self.check()

    def check(self) -> None:
        """To be called after the mask was filled: the library may have given up."""
        if error := self.matcher.error():
            self.fail(error)

    def _look_ahead(self) -> None:
        """Finds out what is forced here."""
        if not (self.forced or self.is_over or self.error) and (forced := self._forced_tokens()):
            self._set_forced(forced)

    def _set_forced(self, forced: list[int]) -> None:
        # The last token is drawn in any case: whether it ends the output shows then.
        self.forced = forced[: max(0, self.budget - 1)]
        jumps = self._min_jump is not None and len(self.forced) >= self._min_jump()
        self.jump = self.forced if jumps else []

    def _take_forced(self) -> None:
        is_accepted = self.matcher.consume_all(self.forced)
        self.token_ids += self.forced
        self.forced = self.jump = []
        if is_accepted:
            self._look_ahead()
        else:
            self._refuse()

    def _refuse(self) -> None:
        self.fail(self.matcher.error() or "a token was drawn that the grammar excludes")

    def _pop_forced(self, token_id: int) -> bool:
        """Counts a token off `forced`; whether it was one."""
        was_forced = bool(self.forced) and self.forced[0] == token_id
        self.forced = self.forced[1:] if was_forced else []
        self.jump = self.jump[1:] if was_forced else []
        return was_forced

    def _take_near_end(self, token_id: int) -> None:
        is_closing = self.is_closing
        if is_closing and not self._is_path_current:
            self._find_path()
        before, was_complete = self._path, self.matcher.is_complete()
        self.token_ids.append(token_id)
        if not self.matcher.consume(token_id):
            # What ends a sequence at a place where it may end is taken; anything else the mask has excluded.
            self.is_over = True
            if not was_complete:
                self._refuse()
            return
        self.is_over = token_id in self._eos_token_ids
        if self.is_over:
            return
        was_forced = self._pop_forced(token_id)
        self._follow(token_id)
        is_lost = is_closing and before is not None and (self._path is None or len(self._path) > self.budget)
        if is_lost and not was_forced:
            assert before is not None
            self.matcher.rollback(1)
            self.token_ids[-1] = before[0] if before else self.grammar.tokens.eos_token_ids[0]
            self.matcher.consume(self.token_ids[-1])
            self.is_over = not before
            self._path, self._is_path_current = before[1:], True
        self.is_complete = self.budget == 0 and not self.is_over and self.matcher.is_complete()

    def _follow(self, token_id: int) -> None:
        """The way to the end after a token was taken; looked for anew where it counts, and now and then before."""
        if self._path and self._is_path_current and self._path[0] == token_id:
            self._path = self._path[1:]
            return
        self._is_path_current = False
        is_due = self.budget == self._closing_from or len(self.token_ids) % CLOSING_INTERVAL == 1
        if self.is_closing or (is_due and self.budget <= self._closing_from):
            self._find_path()

    def _find_path(self) -> None:
        """A way to the end from here: the one known, if it still leads there."""
        if self._path is None or not self._leads_to_end(self._path):
            if self._spare is None:
                self._spare = np.zeros_like(self.mask)
            self._path = closing_path(self.matcher, self.grammar.tokens, self._spare, max(self.budget, 1))
        self._is_path_current = True

    def _leads_to_end(self, path: list[int]) -> bool:
        if not self.matcher.accepts_all(path):
            return False
        for token_id in path:
            self.matcher.consume(token_id)
        is_complete = self.matcher.is_complete()
        if path:
            self.matcher.rollback(len(path))
        return is_complete
