"""A device that works by itself: one copy of tables a step, drawn tokens fed back without the host, read back later.

Owns: the last token that each row drew, on the device.
Never: waits but for what `Readback` reads.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.layers import AttentionMetadata
from penstock.runner.staging import ALIGNMENT, Event, Readback, Recording, RecordingBackend, Staging
from penstock.runner.step_tables import DrawInputs, DrawTables, StepInputs, StepTables


class CudaBackend:
    """torch.cuda's current stream and one beside it, copies from and to pinned memory, events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._beside: torch.cuda.Stream | None = None
        self._graph_pool = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy(self, destination: Tensor, source: Tensor) -> None:
        destination.copy_(source, non_blocking=True)

    def event(self) -> Event:
        event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return event

    def beside(self, work: Callable[[], None], after: Event) -> Event:
        self._beside = self._beside or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        end = self.event()
        with torch.cuda.stream(self._beside):
            after.wait()
            work()
            end.record()
        return end

    def free_bytes(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.mem_get_info(self.device)[0]

    def is_lost(self) -> bool:
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:  # the errors that work on the device ends with stay for good
            return True
        return False

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def record(self, run: Callable[[], None]) -> Recording:
        run()
        return CudaRecording(run, self._graph_pool)


class CudaRecording:
    """A CUDA graph. Other threads may go on allocating while it is captured. Not run on a GPU yet."""

    def __init__(self, run: Callable[[], None], pool: torch.cuda._POOL_HANDLE) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free_bytes = torch.cuda.mem_get_info()[0]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            run()
        self.nbytes = max(free_bytes - torch.cuda.mem_get_info()[0], 0)

    def replay(self) -> None:
        self._graph.replay()


class AsyncDevice:
    """Rows for `max_num_seqs` requests. nbytes: of the largest step's tables (see `table_nbytes`)."""

    is_asynchronous = True

    def __init__(self, backend: RecordingBackend, max_num_seqs: int, nbytes: int) -> None:
        self.backend = backend
        self._staging = Staging(backend, nbytes)
        self._last_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=backend.device)

    def place(self, tables: StepTables, draw: DrawTables | None) -> StepInputs:
        inputs = self.stage(tables, draw)
        if tables.token_ids.min() < 0:
            inputs = inputs._replace(token_ids=self.resolve(inputs.token_ids))
        return inputs

    def stage(self, tables: StepTables, draw: DrawTables | None) -> StepInputs:
        """As they are on the host. Tables of one shape lie in the same places, whatever is drawn."""
        placed = self._staging.place(_arrays(tables, draw))
        token_ids, positions, slots, starts, lens, blocks, types, last_tokens, *rest = placed
        metadata = AttentionMetadata(starts, lens, blocks, slots, types if tables.token_types is not None else None)
        return StepInputs(token_ids, positions, metadata, last_tokens, DrawInputs(*rest) if draw is not None else None)

    def resolve(self, token_ids_T: Tensor) -> Tensor:
        """With the tokens that rows drew last in the places where the host named the row (StepTables.token_ids)."""
        drawn_T = self._last_ids.index_select(0, (-1 - token_ids_T).clamp_(min=0))
        return torch.where(token_ids_T < 0, drawn_T, token_ids_T)

    def feed_back(self, rows_D: Tensor, ids_D: Tensor) -> None:
        """`ids` are what `rows` drew. A row that drew nothing (-1) ends; until then it computes with some token."""
        self._last_ids.index_copy_(0, rows_D, ids_D.clamp(min=0))

    def read_back(self, tensors: Sequence[Tensor]) -> Readback:
        return Readback(self.backend, tensors)

    def send(self, array: NDArray[np.generic]) -> Tensor:
        host = torch.from_numpy(array)
        pinned = self.backend.pinned(tuple(host.shape), host.dtype).copy_(host)
        sent = torch.empty(host.shape, dtype=host.dtype, device=self.backend.device)
        self.backend.copy(sent, pinned)
        return sent


def table_nbytes(max_num_seqs: int, max_num_tokens: int, max_blocks: int) -> int:
    """Of the largest step: four columns of its tokens, ten of its requests, and their block tables."""
    columns = 4 * max_num_tokens + (len(DrawTables._fields) + 3) * (max_num_seqs + 1)
    return 8 * columns + 4 * max_num_seqs * max_blocks + 16 * ALIGNMENT


def _arrays(tables: StepTables, draw: DrawTables | None) -> list[NDArray[np.generic]]:
    """What travels: all but which rows the tables came from."""
    types = tables.token_types if tables.token_types is not None else np.zeros(0, dtype=np.int64)
    return [*tables[:6], types, tables.last_tokens, *(draw or ())]
