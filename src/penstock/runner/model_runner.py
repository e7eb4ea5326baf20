"""Executes the scheduler's plan of a step: applies its diff to the rows, runs the model, samples or pools.

Errors: what a request alone can cause (parameters that cannot be applied, logits without a usable number) ends that
request. When a step as a whole raises, its requests are run again in halves until those that raise are alone; the
others go on as if nothing had happened. That is safe because a step changes no row before it has succeeded, and
writing the same keys and values again changes nothing. A device that has failed for good (DeviceLostError) is nobody's
fault, and nothing is run again.

A device that works by itself (a GPU) is given the next step before the host has heard what this one drew: `launch` and
`finish` are `execute` in two parts. Where a draw depends on earlier tokens beyond the model, `launch` takes the
results of the step before it first.

Owns: the rows, the KV tensors, the model.
Never: decides who runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.base.errors import DeviceLostError, PenstockError
from penstock.config.engine import CacheConfig, EngineConfig
from penstock.config.model import ModelConfig
from penstock.kernels import ops as op_table
from penstock.kernels.devices import open_device
from penstock.loader.package import is_package, read_graph_shapes, write_graph_shapes
from penstock.messages import (
    BlockCopy,
    CaptureStats,
    ErrorInfo,
    SampledTokens,
    ScheduledRequest,
    SchedulerOutput,
    StepResult,
    TokenLogprobs,
)
from penstock.runner.async_device import AsyncDevice, CudaBackend, table_nbytes
from penstock.runner.graph_policy import GraphLimits, GraphPolicy, StepShape
from penstock.runner.host_blocks import HostBlocks
from penstock.runner.input_batch import InputBatch, Promise
from penstock.runner.kv_pool import KVPool, cache_dtype
from penstock.runner.loading import load_model
from penstock.runner.memory import weights_table
from penstock.runner.pooling import LateVectors, Pooler
from penstock.runner.prompt_scores import LatePrompt, score_prompt
from penstock.runner.staging import Readback
from penstock.runner.step_device import HostDevice
from penstock.runner.step_graphs import StepGraphs
from penstock.runner.step_tables import DrawInputs, Int64, StepInputs, StepTables
from penstock.sampling import NO_TOKEN, SamplingBatch, deferred, logprob_entries, sample, token_logprobs
from penstock.structured import GrammarCompiler, TokenMasks

_log = logging.getLogger(__name__)

_NO_NUMBERS: Final = "The model gave no usable numbers for this request."


class LateDraw(NamedTuple):
    """Tokens on their way to the host. raw_logits: of the rows that want log-probabilities, before any edit."""

    request_ids: list[str]
    promise: Promise
    readback: Readback
    num_top: list[tuple[int, int]]
    raw_logits: Tensor | None


class Computed(NamedTuple):
    """What the model made of a step: x and residual of its tokens, or where it was replayed its requests' logits."""

    draw: DrawInputs | None
    x: Tensor  # [T, D], or [R, V] float32
    residual: Tensor | None  # [T, D]


@dataclass(slots=True)
class LaunchedStep:
    """A step that was given to the device. late: what it drew, pooled and scored, until `finish` has read it."""

    result: StepResult
    started_s: float
    late: list[LateDraw | LateVectors | LatePrompt] = field(default_factory=list)


class ModelRunner:
    """The model of one engine and the requests it is computing.

    on_progress: called with a phase ("weights") and the fraction of it that is done. grammars: of this engine.
    device: where the steps run; by default what the configuration names.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_progress: Callable[[str, float], None],
        grammars: GrammarCompiler | None = None,
        device: HostDevice | AsyncDevice | None = None,
    ) -> None:
        assert config.cache.num_blocks > 0 or config.model.is_encoder, "plan_memory comes first"
        torch.set_num_threads(config.num_threads)
        limits = config.scheduler
        self.ops = op_table.load(
            config.kernels,
            config.num_threads,
            device=open_device(config.device),
            batch_invariant=config.batch_invariant,
        )
        self.packing_s = 0.0  # of the start: what the weights' repacking took
        self.weights_table = ""
        self._model = load_model(
            config, self.ops, lambda fraction: on_progress("weights", fraction), self._keep_load_facts
        )
        if self.ops.recordings is not None:
            self.ops.recordings.is_on = True  # from here on the weights stay where they are
        layouts = self.ops.layouts
        self._pool = KVPool(config.model, config.cache.num_blocks, cache_dtype(config, layouts), layouts)
        self._batch = InputBatch(
            limits.max_num_seqs,
            limits.max_model_len,
            config.cache.block_size,
            config.model.vocab_size,
            grammars or GrammarCompiler(),
            num_token_types=config.model.type_vocab_size,
        )
        self._failed: dict[str, ErrorInfo] = {}
        self._device = device or step_device(config, self.ops.layouts.device)
        self._pooler = Pooler(config.model, self._model, self.ops, self._device)
        self._host_blocks = self._make_host_blocks(config.cache)
        self._launched: LaunchedStep | None = None  # the last one, while it has not been finished
        self._finished_s = 0.0
        self._graphs: StepGraphs | None = None
        if config.capture_graphs and isinstance(self._device, AsyncDevice) and not config.model.is_encoder:
            self._graphs = step_graphs(config, self._device, self._logits_of)

    @property
    def captures(self) -> CaptureStats:
        return self._graphs.stats if self._graphs is not None else CaptureStats()

    @property
    def is_asynchronous(self) -> bool:
        return self._device.is_asynchronous

    @torch.inference_mode()
    def try_out(self, output: SchedulerOutput) -> None:
        """Runs a step whose requests nobody made, and forgets them. Raises what it raises."""
        step = LaunchedStep(StepResult(output.step_id, {}, {}, {}, 0.0), time.perf_counter())
        self._apply(output)
        self._run(output.scheduled, step)
        self.finish(step)
        request_ids = [request.request_id for request in output.scheduled]
        self._apply(SchedulerOutput(output.step_id, [], [], request_ids, [], 0))

    def free_bytes(self) -> int:
        """Of the device, when all that it was given is done."""
        assert isinstance(self._device, AsyncDevice)
        return self._device.backend.free_bytes()

    def close(self) -> None:
        """Leaves the device's memory to others. Nothing is run afterwards."""
        assert isinstance(self._device, AsyncDevice)
        backend = self._device.backend
        self._graphs = self._host_blocks = self._launched = None  # captures know the runner
        del self._model, self._pooler, self._pool, self._device
        backend.release()

    def replace_pool(self, model: ModelConfig, cache: CacheConfig) -> None:
        """Gives the KV cache its size. No request is in the runner, and what the pool held is lost."""
        dtype = self._pool.tensors[0].dtype
        self._pool = KVPool(model, cache.num_blocks, dtype, self.ops.layouts)
        self._host_blocks = self._make_host_blocks(cache)

    def _make_host_blocks(self, cache: CacheConfig) -> HostBlocks | None:
        num_slots = cache.num_host_blocks
        return HostBlocks(self._pool, num_slots, self._device.backend) if num_slots else None

    def _keep_load_facts(self, packing_s: float, held: Mapping[str, int]) -> None:
        self.packing_s, self.weights_table = packing_s, weights_table(held)

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Runs one step. A scheduled request that samples is afterwards in `sampled`, `pooled` or `errors`."""
        return self.finish(self.launch(output))

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        """Gives the step to the device. At most one step before it may be unfinished."""
        step = LaunchedStep(StepResult(output.step_id, {}, {}, {}, 0.0), time.perf_counter())
        result = step.result
        self._apply(output)
        healthy = output.scheduled
        if self._failed:
            for request in output.scheduled:
                if request.request_id in self._failed:
                    result.errors[request.request_id] = self._failed[request.request_id]
            healthy = [request for request in output.scheduled if request.request_id not in self._failed]
        if healthy:
            self._run_isolating_errors(healthy, step)
        self._launched = step
        self._capture_next(is_idle=False)
        return step

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Does a piece of work that makes later steps faster, while nobody waits for one. False: there is none."""
        return self._capture_next(is_idle=True)

    def _capture_next(self, *, is_idle: bool) -> bool:
        if self._graphs is None:
            return False
        before_s = self._graphs.stats.seconds
        is_one = self._graphs.capture_next(is_idle=is_idle)
        self._finished_s += self._graphs.stats.seconds - before_s  # no time of the step under way
        return is_one

    @torch.inference_mode()
    def finish(self, step: LaunchedStep) -> StepResult:
        """The result of a step, waited for if need be."""
        late, step.late = step.late, []
        try:
            for each in late:
                match each:
                    case LateVectors():
                        self._take_vectors(each, step.result)
                    case LatePrompt():
                        step.result.prompt_logprobs[each.request_id] = each.entries()
                    case LateDraw():
                        self._take(each, step.result)
        except Exception as error:
            self._raise_if_lost(error)
            raise
        if step.result.seconds == 0.0:
            now = time.perf_counter()
            step.result.seconds = now - max(step.started_s, self._finished_s)
            self._finished_s = now
        return step.result

    def _apply(self, output: SchedulerOutput) -> None:
        for request_id in output.removed_request_ids:
            self._batch.remove(request_id)
            self._pooler.remove(request_id)
            self._failed.pop(request_id, None)
        for new in output.new_requests:
            try:
                self._pooler.add(new)
                self._batch.add(new)
            except PenstockError as error:
                self._failed[new.request_id] = ErrorInfo.of(error)
            except (ValueError, TypeError, OverflowError) as error:
                _log.warning("request %s cannot be run: %s", new.request_id, error)
                self._failed[new.request_id] = ErrorInfo("invalid_request", 400, f"The request cannot be run: {error}.")
        if self._host_blocks is not None:
            self._host_blocks.begin(output)
        if output.block_copies:
            self._copy_blocks(output.block_copies)
        for request in output.scheduled:
            if request.new_block_ids and request.request_id not in self._failed:
                self._batch.append_blocks(request.request_id, request.new_block_ids)

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        ends = [copy.source for copy in copies], [copy.destination for copy in copies]
        device = self.ops.layouts.device  # on a GPU they are there: nothing is waited for
        sources, destinations = (self._device.send(np.array(ids, dtype=np.int64)).to(device) for ids in ends)
        self.ops.copy_blocks(self._pool.tensors, sources, destinations)

    def _run_isolating_errors(self, scheduled: Sequence[ScheduledRequest], step: LaunchedStep) -> None:
        try:
            self._run(scheduled, step)
        except Exception as error:  # whatever it is, it must not end the requests that did not cause it
            self._raise_if_lost(error)
            if len(scheduled) == 1:
                request_id = scheduled[0].request_id
                _log.exception("request %s failed", request_id)
                told = ErrorInfo("internal_error", 500, "This request could not be computed.")
                self._fail(request_id, told, step.result)
                return
            middle = len(scheduled) // 2
            self._run_isolating_errors(scheduled[:middle], step)
            self._run_isolating_errors(scheduled[middle:], step)

    def _raise_if_lost(self, error: Exception) -> None:
        if isinstance(self._device, AsyncDevice) and self._device.backend.is_lost():
            raise DeviceLostError(
                f"The GPU has failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}.",
                remedy="A new engine process is needed. If it comes back, nvidia-smi and dmesg (Xid) say more.",
            ) from error

    def _run(self, scheduled: Sequence[ScheduledRequest], step: LaunchedStep) -> None:
        """Computes the requests' shares; rows and result change only at the end, when nothing can fail any more."""
        result = step.result
        if self._launched is not None and self._batch.is_constrained(scheduled):
            self.finish(self._launched)
        tables = self._batch.prepare(scheduled)
        drawing = self._drawing(scheduled)
        computed = self._compute(scheduled, tables, drawing)
        scored: list[LatePrompt] = []
        pooled = None
        if computed.residual is not None:
            scored = self._score_prompts(scheduled, tables, computed.x, computed.residual)
            if self._pooler:
                pooled = self._pooler.pool(scheduled, tables.last_tokens.tolist(), computed.x, computed.residual)
        draw = computed.draw
        if draw is not None and self._batch.masks:
            drawing, draw = self._jump(scheduled, drawing, tables, draw, result)
        if draw is not None and drawing:
            request_ids = [scheduled[index].request_id for index in drawing]
            self._draw(request_ids, tables.rows[drawing], draw, self._drawn_from(computed, draw.sources), step)
        step.late += scored
        if pooled is not None:
            self._pooler.keep(pooled)
            step.late += pooled.late

    def _compute(self, scheduled: Sequence[ScheduledRequest], tables: StepTables, drawing: list[int]) -> Computed:
        """The model's part of a step: replayed where its shape was captured and nothing but tokens is asked of it."""
        shape = None
        if self._graphs is not None and not self._reads_hidden(scheduled):
            shape = self._graphs.find(tables)
        rows_R, sources_R = tables.rows, tables.last_tokens if shape is None else np.arange(len(scheduled))
        if len(drawing) < len(scheduled):
            rows_R, sources_R = rows_R[drawing], sources_R[drawing]
        draw = self._batch.draw_tables(rows_R, sources_R) if drawing else None
        if self._graphs is not None and shape is not None:
            logits_RV, draw_inputs = self._graphs.replay(shape, tables, draw)
            return Computed(draw_inputs, logits_RV, None)
        inputs = self._device.place(tables, draw)
        return Computed(inputs.draw, *self._forward(inputs))

    def _forward(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        return self._model.forward(inputs.token_ids, inputs.positions, self._pool.caches, inputs.metadata, self.ops)

    def _reads_hidden(self, scheduled: Sequence[ScheduledRequest]) -> bool:
        """Whether more is read of the model than the logits after each request's last token."""
        return (bool(self._pooler) and any(request.request_id in self._pooler for request in scheduled)) or (
            self._batch.scores_prompts
            and any(self._batch.prompt_logprob_targets(request) is not None for request in scheduled)
        )

    def _logits_of(self, inputs: StepInputs) -> Tensor:
        """Logits of all requests of a step."""
        return self._drawn_from(Computed(None, *self._forward(inputs)), inputs.last_tokens)

    def _drawn_from(self, computed: Computed, sources: Tensor) -> Tensor:
        """Logits [R, V] of the rows `sources` of what the model made."""
        x, residual = computed.x, computed.residual
        if len(sources) < len(x):
            sources = sources.to(x.device)
            x = x.index_select(0, sources)
            residual = residual.index_select(0, sources) if residual is not None else None
        return x if residual is None else self._logits(x, residual)

    def _logits(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        """Where draws are made: a device that is waited for leaves them to the host."""
        logits_TV = self._model.logits(x_TD, residual_TD, self.ops)
        return logits_TV if self._device.is_asynchronous else logits_TV.cpu()

    def _drawing(self, scheduled: Sequence[ScheduledRequest]) -> list[int]:
        """Indices of the requests that draw a token in this step."""
        drawing = [index for index, request in enumerate(scheduled) if request.samples]
        if self._pooler:
            drawing = [index for index in drawing if scheduled[index].request_id not in self._pooler]
        return drawing

    def _draw(
        self, request_ids: list[str], rows_R: Int64, inputs: DrawInputs, logits_RV: Tensor, step: LaunchedStep
    ) -> None:
        """Draws a token for each of the requests and records it: now, or in `finish`."""
        if isinstance(self._device, AsyncDevice):
            if self._launched is not None and self._batch.looks_back(rows_R):
                self.finish(self._launched)
            batch = self._batch.sampling_batch(rows_R, inputs)
            step.late.append(self._draw_late(self._device, request_ids, inputs, batch, logits_RV, rows_R))
            return
        batch = self._batch.sampling_batch(rows_R, inputs)
        settle = (lambda drawn: self._batch.advance_grammars(rows_R, drawn)) if batch.masks is not None else None
        token_ids, logprobs = sample(logits_RV, batch, self.ops, settle)
        rows = rows_R.tolist()
        if NO_TOKEN in token_ids:
            usable = [index for index, token_id in enumerate(token_ids) if token_id != NO_TOKEN]
            self._batch.record([rows[index] for index in usable], [token_ids[index] for index in usable])
        else:
            self._batch.record(rows, token_ids)
        self._report(request_ids, rows, token_ids, logprobs, step.result)

    def _draw_late(
        self,
        device: AsyncDevice,
        request_ids: list[str],
        inputs: DrawInputs,
        batch: SamplingBatch,
        logits_RV: Tensor,
        rows_R: Int64,
    ) -> LateDraw:
        drawn = deferred.draw(logits_RV, batch, self.ops, device.send)
        device.feed_back(inputs.rows, drawn.ids)
        readback = device.read_back([drawn.ids, *(drawn.logprobs or ())])
        raw_logits = drawn.raw_logits if batch.masks is not None else None
        return LateDraw(request_ids, self._batch.promise(rows_R), readback, list(batch.logprobs), raw_logits)

    def _take(self, draw: LateDraw, result: StepResult) -> None:
        """Waits for what was drawn and records it."""
        ids_R, *found = draw.readback.arrays()
        drawn = ids_R.tolist()
        token_ids = self._batch.fulfil(draw.promise, drawn)
        logprobs: dict[int, TokenLogprobs] = {}
        if draw.num_top:
            wanted, num_top = [row for row, _ in draw.num_top], [count for _, count in draw.num_top]
            chosen = [max(token_ids[row], 0) for row in wanted]
            if draw.raw_logits is not None and chosen != [max(drawn[row], 0) for row in wanted]:
                ids_L = torch.tensor(chosen, device=draw.raw_logits.device)
                entries = token_logprobs(draw.raw_logits, ids_L, num_top, self.ops)
            else:
                entries = logprob_entries(chosen, found, num_top)
            logprobs = dict(zip(wanted, entries, strict=True))
        self._report(draw.request_ids, draw.promise.rows.tolist(), token_ids, logprobs, result)

    def _take_vectors(self, vectors: LateVectors, result: StepResult) -> None:
        """Waits for what one-pass requests get. One that was removed meanwhile gets nothing."""
        for request_id, vector in vectors.arrived():
            if vector is not None:
                result.pooled[request_id] = vector
            elif request_id in self._pooler:
                self._fail(request_id, ErrorInfo("internal_error", 500, _NO_NUMBERS), result)

    def _report(
        self,
        request_ids: Sequence[str],
        rows: Sequence[int],
        token_ids: Sequence[int],
        logprobs: Mapping[int, TokenLogprobs],
        result: StepResult,
    ) -> None:
        """What the requests drew, into the result."""
        masks = self._batch.masks
        for index, (request_id, token_id) in enumerate(zip(request_ids, token_ids, strict=True)):
            if request_id in self._failed:
                result.errors[request_id] = self._failed[request_id]
            elif token_id == NO_TOKEN:
                self._fail(request_id, _no_token(rows[index], masks), result)
            else:
                found = [logprobs[index]] if index in logprobs else None
                is_complete = bool(masks) and masks.is_complete(rows[index])
                state = self._batch.sampler_state(rows[index])
                result.sampled[request_id] = SampledTokens([token_id], found, is_complete, state)

    def _jump(
        self, scheduled: Sequence[ScheduledRequest], drawing: list[int], tables: StepTables, draw: DrawInputs,
        result: StepResult,
    ) -> tuple[list[int], DrawInputs]:  # fmt: skip
        """Gives out the tokens that grammars force, which need no draw; who draws, and how, without these."""
        rows_D, ends_D = tables.rows, tables.context_lens
        if len(drawing) < len(scheduled):
            rows_D, ends_D = rows_D[drawing], ends_D[drawing]
        jumps = self._batch.jumps_of(rows_D, ends_D)
        if not jumps:
            return drawing, draw
        for place, token_ids in jumps.items():  # what is there already was given before a part of the step failed
            result.sampled.setdefault(scheduled[drawing[place]].request_id, SampledTokens(token_ids))
        places = [place for place, token_ids in jumps.items() if token_ids]
        if places:
            self._batch.jump(rows_D[places].tolist(), [jumps[place] for place in places])
        kept = [place for place in range(len(drawing)) if place not in jumps]
        kept_D = self._device.send(np.array(kept, dtype=np.int64))
        return [drawing[place] for place in kept], DrawInputs(*(column.index_select(0, kept_D) for column in draw))

    def _score_prompts(
        self, scheduled: Sequence[ScheduledRequest], tables: StepTables, x_TD: Tensor, residual_TD: Tensor
    ) -> list[LatePrompt]:
        """Log-probabilities of the prompt tokens that this step's positions predict (p predicts p + 1)."""
        scored: list[LatePrompt] = []
        for request, last in zip(scheduled, tables.last_tokens.tolist(), strict=True):
            wanted = self._batch.prompt_logprob_targets(request)
            if wanted is None:
                continue
            rows = slice(last + 1 - request.num_tokens, last + 1)
            late = score_prompt(x_TD[rows], residual_TD[rows], *wanted, self._logits, self.ops, self._device)
            scored.append(LatePrompt(request.request_id, *wanted, late))
        return scored

    def _fail(self, request_id: str, error: ErrorInfo, result: StepResult) -> None:
        self._failed[request_id] = error
        result.errors[request_id] = error


def _no_token(row: int, masks: TokenMasks) -> ErrorInfo:
    """Why a row's logits left nothing to draw."""
    if row not in masks:
        return ErrorInfo("internal_error", 500, "The model gave no usable probabilities for this request.")
    if error := masks.error(row):
        return ErrorInfo("grammar_failed", 400, f"The grammar cannot be followed any further: {error}.")
    return ErrorInfo(
        "grammar_conflict", 400,
        "Everything the grammar allows here is excluded by min_tokens, bad_words or logit_bias, or has no probability.",
    )  # fmt: skip


def step_device(config: EngineConfig, device: torch.device) -> HostDevice | AsyncDevice:
    """Where the steps of this engine run."""
    if device.type != "cuda":
        return HostDevice(device)
    limits = config.scheduler
    max_blocks = -(-limits.max_model_len // config.cache.block_size)
    nbytes = table_nbytes(limits.max_num_seqs, limits.max_num_batched_tokens, max_blocks)
    return AsyncDevice(CudaBackend(device), limits.max_num_seqs, nbytes)


def step_graphs(config: EngineConfig, device: AsyncDevice, compute: Callable[[StepInputs], Tensor]) -> StepGraphs:
    """The captures of this engine: those that its package names are wanted from the start, and it learns of others."""
    path = Path(config.model_path)
    is_kept = is_package(path)
    wanted = [StepShape(*shape) for shape in read_graph_shapes(path)] if is_kept else []
    return StepGraphs(
        device,
        GraphPolicy(GraphLimits.of(config), wanted),
        config.model.vocab_size,
        compute,
        on_captured=partial(write_graph_shapes, path) if is_kept else lambda _shapes: None,
    )
