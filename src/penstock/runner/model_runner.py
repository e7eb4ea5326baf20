"""Executes the scheduler's plan of a step: applies its diff to the rows, runs the model, samples or pools.

Errors: what a request alone can cause (parameters that cannot be applied, logits without a usable number) ends that
request. When a step as a whole raises, its requests are run again in halves until those that raise are alone; the
others go on as if nothing had happened. That is safe because a step changes no row before it has succeeded, and
writing the same keys and values again changes nothing.

Owns: the rows, the KV tensors, the model.
Never: decides who runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.base.errors import PenstockError
from penstock.config.engine import EngineConfig
from penstock.kernels import ops as op_table
from penstock.kernels.devices import open_device
from penstock.messages import (
    BlockCopy,
    ErrorInfo,
    SampledTokens,
    ScheduledRequest,
    SchedulerOutput,
    StepResult,
    TokenLogprobs,
)
from penstock.runner.input_batch import InputBatch, StepInputs
from penstock.runner.kv_pool import KVPool, cache_dtype
from penstock.runner.loading import load_model
from penstock.runner.pooling import Pooler
from penstock.sampling import NO_TOKEN, sample, token_logprobs
from penstock.structured import GrammarCompiler, TokenMasks

_log = logging.getLogger(__name__)

# Prompt log-probabilities are computed for so many positions at a time: their logits are [rows, vocabulary] float32.
LOGIT_ROWS_PER_PIECE: Final = 64


class ModelRunner:
    """The model of one engine and the requests it is computing.

    on_progress: called with a phase ("weights") and the fraction of it that is done. grammars: of this engine.
    """

    def __init__(
        self, config: EngineConfig, on_progress: Callable[[str, float], None], grammars: GrammarCompiler | None = None
    ) -> None:
        assert config.cache.num_blocks > 0 or config.model.is_encoder, "plan_memory comes first"
        torch.set_num_threads(config.num_threads)
        limits = config.scheduler
        self.ops = op_table.load(config.kernels, config.num_threads, device=open_device(config.device))
        self._model = load_model(config, self.ops, lambda fraction: on_progress("weights", fraction))
        self._pool = KVPool(config.model, config.cache.num_blocks, cache_dtype(config), self.ops.layouts)
        self._batch = InputBatch(
            limits.max_num_seqs,
            limits.max_model_len,
            config.cache.block_size,
            config.model.vocab_size,
            grammars or GrammarCompiler(),
            num_token_types=config.model.type_vocab_size,
        )
        self._pooler = Pooler(config.model, self._model, self.ops)
        self._failed: dict[str, ErrorInfo] = {}

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepResult:
        """Runs one step. A scheduled request that samples is afterwards in `sampled`, `pooled` or `errors`."""
        started = time.perf_counter()
        result = StepResult(output.step_id, {}, {}, {}, 0.0)
        self._apply(output)
        healthy = output.scheduled
        if self._failed:
            for request in output.scheduled:
                if request.request_id in self._failed:
                    result.errors[request.request_id] = self._failed[request.request_id]
            healthy = [request for request in output.scheduled if request.request_id not in self._failed]
        if healthy:
            self._run_isolating_errors(healthy, result)
        result.seconds = time.perf_counter() - started
        return result

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
        if output.block_copies:
            self._copy_blocks(output.block_copies)
        for request in output.scheduled:
            if request.new_block_ids and request.request_id not in self._failed:
                self._batch.append_blocks(request.request_id, request.new_block_ids)

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        sources = torch.tensor([copy.source for copy in copies], dtype=torch.int64)
        destinations = torch.tensor([copy.destination for copy in copies], dtype=torch.int64)
        self.ops.copy_blocks(self._pool.tensors, sources, destinations)

    def _run_isolating_errors(self, scheduled: Sequence[ScheduledRequest], result: StepResult) -> None:
        try:
            self._run(scheduled, result)
        except Exception:  # whatever it is, it must not end the requests that did not cause it
            if len(scheduled) == 1:
                request_id = scheduled[0].request_id
                _log.exception("request %s failed", request_id)
                error = ErrorInfo("internal_error", 500, "This request could not be computed.")
                self._fail(request_id, error, result)
                return
            middle = len(scheduled) // 2
            self._run_isolating_errors(scheduled[:middle], result)
            self._run_isolating_errors(scheduled[middle:], result)

    def _run(self, scheduled: Sequence[ScheduledRequest], result: StepResult) -> None:
        """Computes the requests' shares; rows and result change only at the end, when nothing can fail any more."""
        inputs = self._batch.prepare(scheduled)
        x_TD, residual_TD = self._model.forward(
            inputs.token_ids, inputs.positions, self._pool.caches, inputs.metadata, self.ops
        )
        prompt_logprobs = self._prompt_logprobs(scheduled, inputs, x_TD, residual_TD)
        drawing = [index for index, request in enumerate(scheduled) if request.samples]
        pooled = None
        if self._pooler:
            pooled = self._pooler.pool(scheduled, inputs.last_tokens.tolist(), x_TD, residual_TD)
            drawing = [index for index in drawing if scheduled[index].request_id not in self._pooler]
        if drawing:
            self._sample(scheduled, drawing, inputs, x_TD, residual_TD, result)
        result.prompt_logprobs.update(prompt_logprobs)
        if pooled is not None:
            self._pooler.keep(pooled)
            for request_id, vector in pooled.vectors.items():
                if vector is None:
                    error = ErrorInfo("internal_error", 500, "The model gave no usable numbers for this request.")
                    self._fail(request_id, error, result)
                else:
                    result.pooled[request_id] = vector

    def _sample(
        self,
        scheduled: Sequence[ScheduledRequest],
        drawing: Sequence[int],
        inputs: StepInputs,
        x_TD: Tensor,
        residual_TD: Tensor,
        result: StepResult,
    ) -> None:
        """Draws a token for the requests at the indices `drawing` and records it; forced tokens need no draw."""
        if self._batch.masks:
            drawing = self._jump(scheduled, drawing, inputs.rows, result)
            if not drawing:
                return
        rows_R, last_R = inputs.rows, inputs.last_tokens
        if len(drawing) < len(scheduled):
            rows_R, last_R = rows_R[drawing], last_R[drawing]
        if len(last_R) < len(x_TD):
            index_R = torch.from_numpy(last_R)
            x_TD, residual_TD = x_TD.index_select(0, index_R), residual_TD.index_select(0, index_R)
        logits_RV = self._model.logits(x_TD, residual_TD, self.ops)
        batch, masks = self._batch.sampling_batch(rows_R), self._batch.masks
        settle = (lambda drawn: self._batch.advance_grammars(rows_R, drawn)) if batch.masks is not None else None
        token_ids, logprobs = sample(logits_RV, batch, self.ops, settle)
        rows = rows_R.tolist()
        if NO_TOKEN in token_ids:
            usable = [index for index, token_id in enumerate(token_ids) if token_id != NO_TOKEN]
            self._batch.record([rows[index] for index in usable], [token_ids[index] for index in usable])
        else:
            self._batch.record(rows, token_ids)
        for index, (position, token_id) in enumerate(zip(drawing, token_ids, strict=True)):
            request_id = scheduled[position].request_id
            if token_id == NO_TOKEN:
                self._fail(request_id, _no_token(rows[index], masks), result)
            else:
                found = [logprobs[index]] if index in logprobs else None
                is_complete = bool(masks) and masks.is_complete(rows[index])
                state = self._batch.sampler_state(rows[index])
                result.sampled[request_id] = SampledTokens([token_id], found, is_complete, state)

    def _jump(
        self, scheduled: Sequence[ScheduledRequest], drawing: Sequence[int], rows_R: NDArray[np.int64],
        result: StepResult,
    ) -> Sequence[int]:  # fmt: skip
        """Gives out the tokens that grammars force, which need no draw; the indices of the requests that draw."""
        rows_D = rows_R[drawing]
        jumps = self._batch.jumps_of([scheduled[index] for index in drawing], rows_D)
        if not jumps:
            return drawing
        for place, token_ids in jumps.items():  # what is there already was given before a part of the step failed
            result.sampled.setdefault(scheduled[drawing[place]].request_id, SampledTokens(token_ids))
        places = [place for place, token_ids in jumps.items() if token_ids]
        if places:
            self._batch.jump(rows_D[places].tolist(), [jumps[place] for place in places])
        return [index for place, index in enumerate(drawing) if place not in jumps]

    def _prompt_logprobs(
        self, scheduled: Sequence[ScheduledRequest], inputs: StepInputs, x_TD: Tensor, residual_TD: Tensor
    ) -> dict[str, list[TokenLogprobs]]:
        """Log-probabilities of the prompt tokens that this step's positions predict (p predicts p + 1)."""
        found: dict[str, list[TokenLogprobs]] = {}
        for request, last in zip(scheduled, inputs.last_tokens.tolist(), strict=True):
            wanted = self._batch.prompt_logprob_targets(request)
            if wanted is None:
                continue
            num_top, targets = wanted
            first = last + 1 - request.num_tokens
            entries: list[TokenLogprobs] = []
            for begin in range(0, len(targets), LOGIT_ROWS_PER_PIECE):
                end = min(begin + LOGIT_ROWS_PER_PIECE, len(targets))
                # Clones: `logits` overwrites the residual, and sampling reads the rows again.
                piece = slice(first + begin, first + end)
                logits_RV = self._model.logits(x_TD[piece], residual_TD[piece].clone(), self.ops)
                ids_R = torch.from_numpy(targets[begin:end])
                entries += token_logprobs(logits_RV, ids_R, [num_top] * (end - begin), self.ops)
            found[request.request_id] = entries
        return found

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
