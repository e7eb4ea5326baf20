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
_BITS: Final = (np.uint32(1) << np.arange(32, dtype=np.uint32)).view(np.int32)


class ConstrainedRow:
    """Used by one thread at a time: the mask thread, or who waits for it.

    mask: bit i % 32 of word i // 32 is set where token i may come next; not kept up while there is a jump. forced: the
    tokens that come next. jump: the same where they are given out at once, else empty. error: why there is no mask.
    budget: how many tokens may still be drawn; None when there is no limit to mind. slot: of the mask among those of
    all rows.
    """

    def __init__(
        self,
        grammar: CompiledGrammar,
        mask: NDArray[np.int32],
        slot: int,
        budget: int | None,
        min_jump: Callable[[], int] | None,
    ) -> None:
        """min_jump: how many forced tokens are given out at once, at the least; None: they are all drawn."""
        self.grammar = grammar
        self.slot = slot
        self._min_jump = min_jump
        self._first_budget = budget
        self._closing_from = 2 * (grammar.num_closing_tokens or 0) + 2 * CLOSING_MARGIN
        self._spare: NDArray[np.int32] | None = None
        self.set_mask(mask)
        self.restart()

    def set_mask(self, mask: NDArray[np.int32]) -> None:
        """Where the mask stands from now on; what it holds does not change."""
        self.mask = mask
        self._address = mask.ctypes.data

    def renewed(self, mask: NDArray[np.int32]) -> ConstrainedRow:
        """The same row at the beginning of its output, sharing nothing with this one."""
        return ConstrainedRow(self.grammar, mask, self.slot, self._first_budget, self._min_jump)

    def restart(self) -> None:
        """Back to the beginning of the output."""
        self.matcher = self.grammar.matcher.copy()
        self.forced: list[int] = []
        self.jump: list[int] = []
        self.token_ids: list[int] = []
        self.error = ""
        self.budget = self._first_budget
        self.is_over = False
        self._path: list[int] | None = None
        self._is_path_current = False

    def _is_far_from_end(self, num_tokens: int = 1) -> bool:
        """Whether so many tokens can be taken without a look at what is left of the budget."""
        return self.budget is None or self.budget - num_tokens > self._closing_from

    @property
    def is_closing(self) -> bool:
        """Whether a drawn token is checked before it counts: the way to the end needs nearly all that is left."""
        if self.budget is None or self.is_over:
            return False
        return self.budget <= 1 or (self._path is not None and self.budget - len(self._path) <= CLOSING_MARGIN)

    @property
    def is_complete(self) -> bool:
        """Whether the output could end here."""
        return not self.error and self.matcher.is_complete()

    def takes_in_batch(self, token_id: int, position: int) -> bool:
        """Whether this token can go through a batch call, and `took` with it."""
        return (
            position == len(self.token_ids)
            and not self.is_over
            and not self.error
            and self._is_far_from_end()
            and token_id not in self.grammar.tokens.eos_token_ids
        )

    def took(self, token_id: int, is_accepted: bool) -> None:
        """The matcher has consumed a token, or refused it."""
        self.token_ids.append(token_id)
        if not is_accepted:
            self._refused()
            return
        if self.budget is not None:
            self.budget -= 1
        self._pop_forced(token_id)

    def advance(self, token_ids: Sequence[int], position: int) -> None:
        """Goes on by tokens of which the first stands at `position` of the output. The last of them is afterwards
        another one (token_ids[-1]) where the drawn one left no way to the end. A position that was advanced over
        before (a step that is computed again) changes nothing.
        """
        if not self.token_ids:
            self.look_ahead()
        token_ids = token_ids[max(0, len(self.token_ids) - position) :]
        if len(token_ids) > 1 and token_ids == self.forced and self._is_far_from_end(len(token_ids)):
            self._took_forced(self.matcher.consume_all(self.forced))
            return
        for token_id in token_ids:
            if self.error or self.is_over:
                self.token_ids.append(token_id)
            elif self.takes_in_batch(token_id, len(self.token_ids)):
                self.took(token_id, self.matcher.consume(token_id))
            else:
                self._take_near_end(token_id)
            if not self.forced:
                self.look_ahead()

    def look_ahead(self) -> bool:
        """Finds out what is forced here; whether a mask has to be filled from the matcher."""
        if self.error:
            self.jump = []
            return False
        if not self.forced and not self.is_over:
            self.forced = self.matcher.forced_tokens()
            if self.budget is not None:  # the last token is drawn in any case: whether it ends the output shows then
                del self.forced[max(0, self.budget - 1) :]
            jumps = self._min_jump is not None and len(self.forced) >= self._min_jump()
            self.jump = self.forced if jumps else []
        if self.forced and not self.jump:
            self.mask.fill(0)
            token_id = self.forced[0]
            self.mask[token_id >> 5] = _BITS[token_id & 31]
        return not (self.forced or self.is_over)

    def fill_mask(self) -> None:
        if self.look_ahead():
            self.matcher.fill_mask(self._address, self.mask.nbytes)
            self.error = self.matcher.error()

    def _took_forced(self, is_accepted: bool) -> None:
        self.token_ids += self.forced
        if self.budget is not None:
            self.budget -= len(self.forced)
        self.forced = self.jump = []
        if is_accepted:
            self.look_ahead()
        else:
            self._refused()

    def _refused(self) -> None:
        self.error = self.matcher.error() or "a token was drawn that the grammar excludes"
        self.is_over = True

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
        if not self.matcher.consume(token_id):
            # What ends a sequence at a place where it may end is taken; anything else the mask has excluded.
            self.token_ids.append(token_id)
            self.is_over = True
            if not was_complete:
                self._refused()
            return
        self.is_over = token_id in self.grammar.tokens.eos_token_ids
        if self.budget is not None and not self.is_over:
            self.budget -= 1
            was_forced = self._pop_forced(token_id)
            self._follow(token_id)
            is_lost = is_closing and before is not None and (self._path is None or len(self._path) > self.budget)
            if is_lost and not was_forced:
                assert before is not None
                self.matcher.rollback(1)
                token_id = before[0] if before else self.grammar.tokens.eos_token_ids[0]
                self.matcher.consume(token_id)
                self.is_over = not before
                self._path, self._is_path_current = before[1:], True
        self.token_ids.append(token_id)

    def _follow(self, token_id: int) -> None:
        """The way to the end after a token was taken; looked for anew where it counts, and now and then before."""
        if self._path and self._is_path_current and self._path[0] == token_id:
            self._path = self._path[1:]
            return
        self._is_path_current = False
        assert self.budget is not None
        is_due = self.budget == self._closing_from or len(self.token_ids) % CLOSING_INTERVAL == 0
        if self.is_closing or (is_due and self.budget <= self._closing_from):
            self._find_path()

    def _find_path(self) -> None:
        """A way to the end from here: the one known, if it still leads there."""
        if self._path is None or not self._leads_to_end(self._path):
            assert self.budget is not None
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
