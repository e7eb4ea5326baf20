"""Steps captured once and replayed as one: the kernels of a model are no longer launched from Python one by one.

A captured step reads its tables where every step's lie (Staging) and leaves its logits in one buffer that all share, so
a replay is the copy of its tables and one launch. Padding: tokens that no request owns, whose slot is none (-1), and
requests without tokens; they write nothing, and what they compute nobody reads. The draw is not captured: what it takes
depends on what the requests ask for.

Owns: the captured steps, the buffer of their logits.
Never: decides which are worth it (graph_policy); lets a failed capture reach a request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from penstock.messages import CaptureStats
from penstock.runner.async_device import AsyncDevice
from penstock.runner.graph_policy import GraphPolicy, StepShape
from penstock.runner.staging import Recording
from penstock.runner.step_tables import DrawInputs, DrawTables, StepInputs, StepTables

_log = logging.getLogger(__name__)


class StepGraphs:
    """compute: from a step's inputs, their token ids resolved, to the logits [R, V] float32 of its requests.

    on_captured: is told after a capture which shapes an engine that starts anew should capture.
    """

    def __init__(
        self,
        device: AsyncDevice,
        policy: GraphPolicy,
        vocab_size: int,
        compute: Callable[[StepInputs], Tensor],
        on_captured: Callable[[list[StepShape]], None],
    ) -> None:
        self._device = device
        self._policy = policy
        self._vocab_size = vocab_size
        self._compute = compute
        self._on_captured = on_captured
        self._recordings: dict[StepShape, Recording] = {}
        self._logits: Tensor | None = None
        self.stats = CaptureStats()

    def find(self, tables: StepTables) -> StepShape | None:
        """The captured shape to run these tables in; None: they are run kernel by kernel."""
        shape = self._policy.find(shape_of(tables))
        if shape is None:
            self.stats.num_launched += 1
        return shape

    def replay(self, shape: StepShape, tables: StepTables, draw: DrawTables | None) -> tuple[Tensor, DrawInputs | None]:
        """(logits [R, V] of the requests, valid until the next replay; the draw's parameters on the device)."""
        assert self._logits is not None
        inputs = self._device.stage(pad(tables, shape), draw)
        self._recordings[shape].replay()
        self.stats.num_replayed += 1
        return self._logits[: len(tables.rows)], inputs.draw

    def capture_next(self, *, is_idle: bool) -> bool:
        """Captures one more shape, if one is due; whether it did. is_idle: no request is waiting."""
        shape = self._policy.next_capture(is_idle=is_idle)
        if shape is None:
            return False
        started = time.perf_counter()
        try:
            recording, nbytes = self._capture(shape)
        except Exception:  # whatever it is, steps of this shape run as they did
            _log.exception("steps of %s cannot be captured; they are launched kernel by kernel", shape)
            self._policy.refuse(shape)
            self.stats.num_failed += 1
        else:
            self._recordings[shape] = recording
            self._policy.keep(shape, nbytes)
            self._on_captured(self._policy.worthwhile)
        self.stats.num_captured = len(self._recordings)
        self.stats.num_waiting = len(self._policy.waiting())
        self.stats.nbytes = self._policy.nbytes
        self.stats.seconds += time.perf_counter() - started
        return True

    def _capture(self, shape: StepShape) -> tuple[Recording, int]:
        """The recording, and the bytes it took."""
        if self._logits is None:
            size = (self._policy.limits.max_requests, self._vocab_size)
            self._logits = torch.empty(size, dtype=torch.float32, device=self._device.backend.device)
        logits_RV = self._logits[: shape.num_requests]
        inputs = self._device.stage(pad(_NOTHING, shape), None)

        def run() -> None:
            token_ids = self._device.resolve(inputs.token_ids)
            logits_RV.copy_(self._compute(inputs._replace(token_ids=token_ids)))

        recording = self._device.backend.record(run)
        return recording, recording.nbytes


def shape_of(tables: StepTables) -> StepShape:
    return StepShape(len(tables.token_ids), len(tables.rows), tables.block_tables.shape[1])


def pad(tables: StepTables, shape: StepShape) -> StepTables:
    """The same step in a shape at least as large. Padding has no slot, no context and no tokens of its own."""
    num_tokens, num_requests, num_blocks = shape
    count, requests = len(tables.token_ids), len(tables.rows)
    token_ids, positions = np.zeros((2, num_tokens), dtype=np.int64)
    token_ids[:count], positions[:count] = tables.token_ids, tables.positions
    slots = np.full(num_tokens, -1, dtype=np.int64)
    slots[:count] = tables.slot_mapping
    starts = np.full(num_requests + 1, count, dtype=np.int32)
    starts[: requests + 1] = tables.query_starts
    lens = np.zeros(num_requests, dtype=np.int32)
    lens[:requests] = tables.context_lens
    blocks = np.zeros((num_requests, num_blocks), dtype=np.int32)
    blocks[:requests, : tables.block_tables.shape[1]] = tables.block_tables
    last = np.zeros(num_requests, dtype=np.int64)
    last[:requests] = tables.last_tokens
    return StepTables(token_ids, positions, slots, starts, lens, blocks, None, tables.rows, last)


_NONE_64, _NONE_32 = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)
_NOTHING = StepTables(
    _NONE_64, _NONE_64, _NONE_64, np.zeros(1, dtype=np.int32), _NONE_32, np.zeros((0, 0), dtype=np.int32), None,
    _NONE_64, _NONE_64,
)  # fmt: skip
