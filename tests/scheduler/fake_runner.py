"""A runner without a model: it checks every plan it gets, and its "attention" really reads the block table's slots.

A slot holds the digest of all tokens up to its position. A token is drawn from the digest in the last slot of its
context, so a wrong block, a lost copy or a stale write gives a wrong token, exactly as it would with a model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.messages import (
    ErrorInfo,
    NewRequestData,
    SampledTokens,
    ScheduledRequest,
    SchedulerOutput,
    StepResult,
    TokenLogprobs,
)

VOCAB_SIZE = 50
START = 1


def extend_digest(digest: int, token_id: int) -> int:
    return zlib.crc32(token_id.to_bytes(4, "little"), digest)


def digest_of(token_ids: Sequence[int]) -> int:
    digest = START
    for token_id in token_ids:
        digest = extend_digest(digest, token_id)
    return digest


def undisturbed_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What a request draws with nobody beside it."""
    digest = digest_of(prompt)
    drawn = []
    for _ in range(count):
        drawn.append(digest % VOCAB_SIZE)
        digest = extend_digest(digest, drawn[-1])
    return drawn


@dataclass
class Row:
    token_ids: list[int]
    num_prompt_tokens: int
    wants_prompt_logprobs: bool
    is_one_pass: bool
    block_ids: list[int] = field(default_factory=list)
    num_computed: int | None = None
    has_failed: bool = False


class FakeRunner:
    """Executes plans in order of launch. fails(request_id): whether this share of a step ends in an error.
    jumps: some draws give several tokens, as where a grammar forces them.

    Copies from the host tier arrive as late as they may: before the next step, unless this one awaits them.
    updated_step: the last step whose result the scheduler has heard; only what it wrote may go to the host tier."""

    def __init__(self, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.rows: dict[str, Row] = {}
        self.slots: dict[int, int] = {}
        self.written_in: dict[int, int] = {}  # block -> step
        self.host: dict[int, list[int | None]] = {}
        self.arriving: list[tuple[list[int | None], int]] = []
        self.updated_step = 0
        self.pools_every_token = False
        self.jumps = False
        self.fails: Callable[[str], bool] = lambda request_id: False
        self.step_id = 0

    def execute(self, output: SchedulerOutput) -> StepResult:
        self._check_plan(output)
        for request_id in output.removed_request_ids:
            del self.rows[request_id]
        for new in output.new_requests:
            self._add_row(new)
        assert len(self.rows) <= self.max_num_seqs
        self._move_blocks(output)
        for copy in output.block_copies:
            for offset in range(self.block_size):
                source = self.slots.get(copy.source * self.block_size + offset)
                if source is not None:
                    self.slots[copy.destination * self.block_size + offset] = source
        self._check_ownership(output.scheduled)
        result = StepResult(output.step_id, {}, {}, {}, 0.001 * output.num_tokens)
        for share in output.scheduled:
            self._compute(share, result)
        return result

    def _move_blocks(self, output: SchedulerOutput) -> None:
        self._arrive()
        assert len({copy.destination for copy in output.offloads}) == len(output.offloads)
        for copy in output.offloads:
            assert self.written_in[copy.source] <= self.updated_step, "a block left before its step was heard of"
            self.host[copy.destination] = [self.slots.get(slot) for slot in self._slots_of(copy.source)]
        for copy in output.restores:
            self.arriving.append((self.host.pop(copy.source), copy.destination))
            for slot in self._slots_of(copy.destination):
                self.slots[slot] = -1  # nobody may read it yet
        if output.awaits_restores:
            self._arrive()

    def _arrive(self) -> None:
        for digests, block in self.arriving:
            self.written_in[block] = 0
            for slot, digest in zip(self._slots_of(block), digests, strict=True):
                assert digest is not None
                self.slots[slot] = digest
        self.arriving = []

    def _slots_of(self, block: int) -> range:
        return range(block * self.block_size, (block + 1) * self.block_size)

    def _check_plan(self, output: SchedulerOutput) -> None:
        assert output.step_id == self.step_id + 1
        self.step_id = output.step_id
        assert output.scheduled
        assert output.num_tokens == sum(share.num_tokens for share in output.scheduled)
        assert output.num_tokens <= self.max_num_batched_tokens
        ids = [share.request_id for share in output.scheduled]
        assert len(set(ids)) == len(ids)
        assert {new.request_id for new in output.new_requests} <= set(ids)
        destinations = [copy.destination for copy in output.block_copies]
        assert len(set(destinations)) == len(destinations)
        assert not set(destinations) & {copy.source for copy in output.block_copies}

    def _add_row(self, new: NewRequestData) -> None:
        assert new.request_id not in self.rows
        self.rows[new.request_id] = Row(
            list(new.token_ids),
            new.num_prompt_tokens,
            new.sampling.prompt_logprobs is not None,
            new.pooling is not None,
        )

    def _check_ownership(self, shares: list[ScheduledRequest]) -> None:
        """Every slot that is written belongs to one request only."""
        writers: dict[int, str] = {}
        readers: dict[int, str] = {}
        for share in shares:
            row = self.rows[share.request_id]
            row.block_ids += share.new_block_ids
            assert len(set(row.block_ids)) == len(row.block_ids)
            first = share.num_computed_tokens
            last = first + share.num_tokens - 1
            for index in range(first // self.block_size, last // self.block_size + 1):
                assert writers.setdefault(row.block_ids[index], share.request_id) == share.request_id
                self.written_in[row.block_ids[index]] = self.step_id
            for index in range(first // self.block_size):
                readers[row.block_ids[index]] = share.request_id
        for block, reader in readers.items():
            assert writers.get(block, reader) == reader, "a block is read and written in one step"

    def _compute(self, share: ScheduledRequest, result: StepResult) -> None:
        row = self.rows[share.request_id]
        first, end = share.num_computed_tokens, share.num_computed_tokens + share.num_tokens
        assert row.num_computed in (None, first), "positions are contiguous"
        if row.num_computed is None and row.is_one_pass and self.pools_every_token:
            assert first == 0, "a cached prefix gives no states to pool"
        assert share.num_tokens > 0
        assert end <= len(row.token_ids), "a token is computed before it is drawn"
        assert share.samples or end < len(row.token_ids)
        is_void = share.samples and end < len(row.token_ids)
        assert self.jumps or not is_void
        row.num_computed = end
        row.has_failed = row.has_failed or self.fails(share.request_id)
        if row.has_failed:
            for position in range(first, end):
                self.slots[self._slot(row, position)] = -1  # nobody may ever read this
            result.errors[share.request_id] = ErrorInfo("test", 500, "injected")
            if share.samples and not (row.is_one_pass or is_void):
                row.token_ids.append(0)  # the next step may be planned already
            return
        for position in range(first, end):
            before = self.slots[self._slot(row, position - 1)] if position else START
            self.slots[self._slot(row, position)] = extend_digest(before, row.token_ids[position])
        self._read_context(row, first)
        if row.wants_prompt_logprobs and first < row.num_prompt_tokens:
            result.prompt_logprobs[share.request_id] = [
                TokenLogprobs(row.token_ids[position + 1], -float(position + 1), 1)
                for position in range(first, min(end, row.num_prompt_tokens - 1))
            ]
        if share.samples and row.is_one_pass:
            result.pooled[share.request_id] = self.slots[self._slot(row, end - 1)].to_bytes(4, "little")
        elif is_void:
            result.sampled[share.request_id] = SampledTokens([])
        elif share.samples:
            digest = self.slots[self._slot(row, end - 1)]
            count = 2 + digest // 7 % 9 if self.jumps and digest % 5 == 0 else 1
            drawn = undisturbed_tokens(row.token_ids, count)
            assert drawn[0] == digest % VOCAB_SIZE
            row.token_ids += drawn
            result.sampled[share.request_id] = SampledTokens(drawn)

    def _read_context(self, row: Row, end: int) -> None:
        digest = START
        for position in range(end):
            digest = extend_digest(digest, row.token_ids[position])
            assert self.slots[self._slot(row, position)] == digest, f"position {position} holds foreign keys and values"

    def _slot(self, row: Row, position: int) -> int:
        return row.block_ids[position // self.block_size] * self.block_size + position % self.block_size
