"""One permanent row for each request in the runner: its tokens, block table and sampling parameters.

A step's inputs are gathered from the rows with a fixed number of numpy calls, however many requests it has. Sampled
tokens are kept on the row, so the next step needs nothing from the scheduler.

Owns: the rows.
Never: decides who runs; calls the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.messages import GrammarKind, NewRequestData, ScheduledRequest
from penstock.runner.step_tables import DrawInputs, DrawTables, Int64, StepTables
from penstock.sampling import FilteredRow, LogitEdits, RowEdits, RowFilters, SamplingBatch, uniforms
from penstock.structured import GrammarCompiler, TokenMasks


class Promise(NamedTuple):
    """Rows that drew a token which the host has not heard of. occupants: whose the rows were."""

    rows: Int64
    counts: Int64  # tokens of each before the draw
    occupants: Int64


class InputBatch:
    """Rows for at most `max_num_seqs` requests of at most `max_model_len` tokens in blocks of `block_size`.

    grammars: where the compiled grammars of constrained requests come from. num_token_types: kinds of token that the
    model tells apart; from 2 on the second text of a pair is one.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int, grammars: GrammarCompiler,
        *, num_token_types: int = 0,
    ) -> None:  # fmt: skip
        self._block_size = block_size
        self._num_token_types = num_token_types
        self._vocab_size = vocab_size
        self._max_blocks = -(-max_model_len // block_size)
        self._row_tokens = max_model_len + 1  # the last token drawn is kept too, though it is never computed
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._row_of: dict[str, int] = {}
        # Large arrays are zero pages until a request reaches them.
        self._token_ids = np.zeros((max_num_seqs, self._row_tokens), dtype=np.int64)
        self._block_tables = np.zeros((max_num_seqs, self._max_blocks), dtype=np.int32)
        self._num_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._second_text_start = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_blocks = [0] * max_num_seqs
        self._occupants = np.zeros(max_num_seqs, dtype=np.int64)  # how many requests have had the row
        self._temperature = np.zeros(max_num_seqs, dtype=np.float32)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int32)
        self._top_p = np.ones(max_num_seqs, dtype=np.float32)
        self._min_p = np.zeros(max_num_seqs, dtype=np.float32)
        self._seeds = np.zeros(max_num_seqs, dtype=np.uint64)
        self._edits: dict[int, LogitEdits] = {}
        self._filters: dict[int, RowFilters] = {}
        self._logprobs: dict[int, int] = {}
        self._prompt_logprobs: dict[int, int] = {}
        self._grammars = grammars
        self.masks = TokenMasks(vocab_size, max_num_seqs)

    # ---- the scheduler's diff

    def add(self, request: NewRequestData) -> None:
        """Gives the request a row. ValueError: it does not fit one; then nothing changed."""
        token_ids = np.array(request.token_ids, dtype=np.int64)
        if not 0 < len(token_ids) < self._row_tokens:
            raise ValueError(f"{len(token_ids)} tokens do not fit a context of {self._row_tokens - 1}")
        if token_ids.min() < 0 or token_ids.max() >= self._vocab_size:
            raise ValueError("a token id is outside the vocabulary")
        sampling = request.sampling
        edits = LogitEdits.of(sampling, request.stop_token_ids, token_ids, request.num_prompt_tokens, self._vocab_size)
        grammar = self._grammars.compiled(sampling.grammar) if sampling.grammar is not None else None
        assert request.request_id not in self._row_of, request.request_id
        row = self._free_rows.pop()
        self._row_of[request.request_id] = row
        self._occupants[row] += 1
        self._token_ids[row, : len(token_ids)] = token_ids
        self._num_tokens[row] = len(token_ids)
        self._num_prompt_tokens[row] = request.num_prompt_tokens
        second_text_start = request.pooling.second_text_start if request.pooling is not None else 0
        self._second_text_start[row] = second_text_start or self._row_tokens
        self._num_blocks[row] = 0
        self._temperature[row] = sampling.temperature
        self._top_k[row] = sampling.top_k
        self._top_p[row] = sampling.top_p
        self._min_p[row] = sampling.min_p
        self._seeds[row] = (sampling.seed or 0) % 2**64
        if edits is not None:
            self._edits[row] = edits
        filters = RowFilters.of(sampling, request.sampler_state)
        if filters is not None:
            self._filters[row] = filters
        if sampling.logprobs is not None:
            self._logprobs[row] = sampling.logprobs
        if sampling.prompt_logprobs is not None:
            self._prompt_logprobs[row] = sampling.prompt_logprobs
        if grammar is not None:
            output_ids = request.token_ids[request.num_prompt_tokens :]
            is_text = sampling.grammar is not None and sampling.grammar.kind is GrammarKind.TEXT
            # Where more than the grammar says what comes next, or someone asks how probable it was, all is drawn.
            jumps = edits is None and filters is None and sampling.logprobs is None
            self.masks.add(row, grammar, output_ids, None if is_text else sampling.max_tokens, jumps=jumps)

    def remove(self, request_id: str) -> None:
        """Frees the request's row. Unknown ids are ignored: the request may never have got one."""
        row = self._row_of.pop(request_id, None)
        if row is None:
            return
        self._free_rows.append(row)
        self._temperature[row] = 0.0
        self._edits.pop(row, None)
        self._filters.pop(row, None)
        self._logprobs.pop(row, None)
        self._prompt_logprobs.pop(row, None)
        self.masks.remove(row)

    def append_blocks(self, request_id: str, block_ids: Sequence[int]) -> None:
        row = self._row_of[request_id]
        begin = self._num_blocks[row]
        end = begin + len(block_ids)
        assert end <= self._max_blocks, (request_id, end, self._max_blocks)
        self._block_tables[row, begin:end] = block_ids
        self._num_blocks[row] = end

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._row_of

    # ---- a step's inputs

    def prepare(self, scheduled: Sequence[ScheduledRequest]) -> StepTables:
        """Tables of the requests' shares, in their order. Changes nothing."""
        row_of = self._row_of
        rows_R = np.array([row_of[request.request_id] for request in scheduled], dtype=np.int64)
        starts_R = np.array([request.num_computed_tokens for request in scheduled], dtype=np.int64)
        counts_R = np.array([request.num_tokens for request in scheduled], dtype=np.int64)
        ends_R = starts_R + counts_R
        self._check(scheduled, rows_R, ends_R)
        query_starts = np.zeros(len(scheduled) + 1, dtype=np.int64)
        np.cumsum(counts_R, out=query_starts[1:])
        num_tokens = int(query_starts[-1])
        if num_tokens == len(scheduled):
            rows_T, positions_T = rows_R, starts_R
        else:
            rows_T = rows_R.repeat(counts_R)
            positions_T = np.arange(num_tokens) - (query_starts[:-1] - starts_R).repeat(counts_R)
        blocks_T = self._block_tables[rows_T, positions_T // self._block_size].astype(np.int64)
        slots_T = blocks_T * self._block_size + positions_T % self._block_size
        width = -(-int(ends_R.max()) // self._block_size)
        return StepTables(
            self._token_ids[rows_T, positions_T],
            positions_T,
            slots_T,
            query_starts.astype(np.int32),
            ends_R.astype(np.int32),
            self._block_tables[rows_R, :width],
            self._token_types(rows_T, positions_T) if self._num_token_types else None,
            rows_R,
            query_starts[1:] - 1,
        )

    def _token_types(self, rows_T: Int64, positions_T: Int64) -> Int64:
        if self._num_token_types == 1:
            return np.zeros(len(rows_T), dtype=np.int64)
        return (positions_T >= self._second_text_start[rows_T]).astype(np.int64)

    def draw_tables(self, rows_R: Int64, sources_R: Int64) -> DrawTables:
        """Sampling parameters of `rows`, which draw their next tokens from the model's rows `sources`."""
        temperature_R = self._temperature[rows_R]
        if temperature_R.any():
            positions_R = self._num_tokens[rows_R] - self._num_prompt_tokens[rows_R]
            uniform_R = uniforms(self._seeds[rows_R], positions_R.astype(np.uint64))
        else:
            uniform_R = np.zeros(len(rows_R))
        parameters = (temperature_R, self._top_k[rows_R], self._top_p[rows_R], self._min_p[rows_R], uniform_R)
        return DrawTables(rows_R, sources_R, *parameters)

    def sampling_batch(self, rows_R: Int64, draw: DrawInputs) -> SamplingBatch:
        """All that decides the draws of `rows`. Needs the tokens that they drew before."""
        edits: list[RowEdits] = []
        filtered: list[FilteredRow] = []
        logprobs: list[tuple[int, int]] = []
        if self._edits or self._filters or self._logprobs:
            for index, row in enumerate(rows_R.tolist()):
                if row in self._filters:
                    position = int(self._num_tokens[row] - self._num_prompt_tokens[row])
                    token_ids = self._token_ids[row, : self._num_tokens[row]]
                    filtered.append(FilteredRow(index, self._filters[row], token_ids, position))
                if row in self._edits:
                    edits.append(RowEdits(index, self._edits[row], self._output_ids(row)))
                if row in self._logprobs:
                    logprobs.append((index, self._logprobs[row]))
        return SamplingBatch(
            draw.temperature,
            draw.top_k,
            draw.top_p,
            draw.min_p,
            draw.uniform,
            edits,
            logprobs,
            self.masks.masks(rows_R.tolist()) if self.masks else None,
            filtered,
        )

    def is_constrained(self, scheduled: Sequence[ScheduledRequest]) -> bool:
        """Whether a request obeys a grammar, which may put other tokens in the place of the one drawn."""
        return bool(self.masks) and any(self._row_of[request.request_id] in self.masks for request in scheduled)

    def looks_back(self, rows_R: Int64) -> bool:
        """Whether a row's next draw depends on the tokens it drew before, beyond the model."""
        return bool(self._edits or self._filters) and any(
            row in self._edits or row in self._filters for row in rows_R.tolist()
        )

    def advance_grammars(self, rows_R: Int64, token_ids: list[int]) -> list[int]:
        """Tells the grammars of `rows` what was drawn, before it is recorded; the tokens that count."""
        return self._advance(rows_R, self._num_tokens[rows_R], token_ids)

    def _advance(self, rows_R: Int64, counts_R: Int64, token_ids: list[int]) -> list[int]:
        """counts: tokens of each row before the draw."""
        positions_R = counts_R - self._num_prompt_tokens[rows_R]
        return self.masks.advance(rows_R.tolist(), token_ids, positions_R.tolist())

    def jumps_of(self, rows_R: Int64, ends_R: NDArray[np.int32]) -> dict[int, list[int]]:
        """By index, for those of the sampling rows that need no draw: the tokens that their grammars force next. None
        are left where they are known already, from a step before which this one was planned. ends: of their shares."""
        known_R = self._num_tokens[rows_R]
        # The last token that a row has room for is drawn in any case.
        jumps = {
            index: token_ids[: max(0, self._row_tokens - 1 - int(known_R[index]))]
            for index, token_ids in self.masks.jumps_of(rows_R.tolist()).items()
        }
        return jumps | {index: [] for index in (known_R > ends_R).nonzero()[0].tolist()}

    def jump(self, rows: Sequence[int], jumps: Sequence[Sequence[int]]) -> None:
        """Appends forced tokens to the rows."""
        starts = self._num_tokens[rows]
        for row, start, token_ids in zip(rows, starts.tolist(), jumps, strict=True):
            self._token_ids[row, start : start + len(token_ids)] = token_ids
            self._num_tokens[row] = start + len(token_ids)
        positions = (starts - self._num_prompt_tokens[rows]).tolist()
        self.masks.jump(list(zip(rows, jumps, positions, strict=True)))

    @property
    def scores_prompts(self) -> bool:
        """Whether any request wants log-probabilities of its prompt."""
        return bool(self._prompt_logprobs)

    def prompt_logprob_targets(self, request: ScheduledRequest) -> tuple[int, Int64] | None:
        """(alternatives, next tokens of the first positions of this share) if it wants logprobs of its prompt."""
        if not self._prompt_logprobs:
            return None
        row = self._row_of[request.request_id]
        if row not in self._prompt_logprobs:
            return None
        begin = request.num_computed_tokens + 1
        end = min(begin + request.num_tokens, int(self._num_prompt_tokens[row]))
        if begin >= end:
            return None
        return self._prompt_logprobs[row], self._token_ids[row, begin:end].copy()

    def record(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Appends a sampled token to each of the rows."""
        counts = self._num_tokens[rows]
        self._token_ids[rows, counts] = token_ids
        self._num_tokens[rows] = counts + 1
        self._note(rows, token_ids)

    def promise(self, rows_R: Int64) -> Promise:
        """Appends a token that was drawn and is heard of later to each of the rows. `fulfil` names it."""
        counts_R = self._num_tokens[rows_R]
        self._token_ids[rows_R, counts_R] = -1 - rows_R
        self._num_tokens[rows_R] = counts_R + 1
        return Promise(rows_R, counts_R, self._occupants[rows_R])

    def fulfil(self, promise: Promise, token_ids: list[int]) -> list[int]:
        """The tokens of a promise (negative: none), in the rows that are still of the same requests.

        Returns the tokens that count: a grammar may have put another in the place of the one drawn.
        """
        is_here = self._occupants[promise.rows] == promise.occupants
        if self.masks:
            drawn = [token_id if here else -1 for token_id, here in zip(token_ids, is_here.tolist(), strict=True)]
            counted = self._advance(promise.rows, promise.counts, drawn)
            token_ids = [now if now >= 0 else was for now, was in zip(counted, token_ids, strict=True)]
        usable = is_here & (np.array(token_ids) >= 0)
        rows_U, ids_U = promise.rows[usable], np.array(token_ids)[usable]
        self._token_ids[rows_U, promise.counts[usable]] = ids_U
        self._note(rows_U.tolist(), ids_U.tolist())
        return token_ids

    def _note(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Tells edits and filters of the rows what was drawn."""
        if self._edits:
            for row, token_id in zip(rows, token_ids, strict=True):
                if row in self._edits:
                    self._edits[row].add(token_id)
        if self._filters:
            for row, token_id in zip(rows, token_ids, strict=True):
                if row in self._filters:
                    self._filters[row].record(token_id)

    def sampler_state(self, row: int) -> float | None:
        """See SampledTokens."""
        return self._filters[row].state if row in self._filters else None

    def _output_ids(self, row: int) -> Int64:
        return self._token_ids[row, self._num_prompt_tokens[row] : self._num_tokens[row]]

    def _check(self, scheduled: Sequence[ScheduledRequest], rows_R: Int64, ends_R: Int64) -> None:
        """A share ends at known tokens. It samples when it ends at the last one; else only where the plan was made
        before it was known that tokens are forced."""
        known_R = self._num_tokens[rows_R]
        samples_R = np.array([request.samples for request in scheduled])
        assert (ends_R <= known_R).all(), (scheduled, known_R)
        is_last_R = ends_R == known_R
        assert (samples_R | ~is_last_R).all(), (scheduled, known_R)
        assert all(row in self.masks for row in rows_R[samples_R & ~is_last_R].tolist()), (scheduled, known_R)
