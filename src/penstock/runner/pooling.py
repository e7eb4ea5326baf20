"""What one-pass requests get out of a step: hidden states pooled to a vector, or scores of a classifier's labels.

A vector over several tokens is summed up chunk by chunk, in float64: how a text was cut into steps does not show.

Owns: the parameters and partial sums of one-pass requests.
Never: decides who runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.config.model import ModelConfig
from penstock.kernels.ops import Ops
from penstock.messages import NewRequestData, PoolingParams, ScheduledRequest
from penstock.models import LanguageModel
from penstock.runner.staging import Backend, Readback
from penstock.runner.step_device import StepDevice


class LateVectors(NamedTuple):
    """Vectors on their way to the host, behind each other. sizes: by request."""

    sizes: dict[str, int]
    readback: Readback

    @classmethod
    def of(cls, vectors: Mapping[str, Tensor], backend: Backend) -> LateVectors:
        sizes = {request_id: len(vector) for request_id, vector in vectors.items()}
        return cls(sizes, Readback(backend, [torch.cat(list(vectors.values()))]))

    def arrived(self) -> Iterator[tuple[str, bytes | None]]:
        """Waits for them: (request, its vector in little-endian float32, or None where a number is not finite)."""
        [flat] = self.readback.arrays()
        begin = 0
        for request_id, size in self.sizes.items():
            vector = flat[begin : begin + size]
            begin += size
            yield request_id, vector.astype("<f4").tobytes() if np.isfinite(vector).all() else None


class Pooled(NamedTuple):
    """late: of the requests that ended. sums: [D] float64 of the others, on the device, to be kept."""

    late: list[LateVectors]
    sums: dict[str, Tensor]


class Pooler:
    """The one-pass side of a runner."""

    def __init__(self, config: ModelConfig, model: LanguageModel, ops: Ops, device: StepDevice) -> None:
        self._config = config.pooler
        self._is_encoder = config.is_encoder
        self._embedding_size = config.hidden_size
        self._model = model
        self._ops = ops
        self._device = device
        self._params: dict[str, PoolingParams] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, request: NewRequestData) -> None:
        """ValueError: the model cannot give what the request asks for; then nothing changed."""
        params = request.pooling
        if params is None:
            return
        if (params.kind == "classify") != bool(self._config.labels):
            raise ValueError(f"this model cannot {params.kind}")
        if not 1 <= (params.dimensions or 1) <= self._embedding_size:
            raise ValueError("dimensions exceeds the size of a vector")
        self._params[request.request_id] = params

    def remove(self, request_id: str) -> None:
        """Unknown ids are ignored."""
        self._params.pop(request_id, None)
        self._sums.pop(request_id, None)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._params

    def __bool__(self) -> bool:
        return bool(self._params)

    def pool(
        self, scheduled: Sequence[ScheduledRequest], last_tokens: Sequence[int], x_TD: Tensor, residual_TD: Tensor
    ) -> Pooled:
        """What this step's states mean for the one-pass requests in it. Changes nothing: see `keep`. Waits for nothing.

        last_tokens: index in [0, T) of each request's last token in this step.
        """
        spans: list[tuple[ScheduledRequest, range]] = []
        for request, last in zip(scheduled, last_tokens, strict=True):
            if request.request_id in self._params:
                spans.append((request, self._wanted(request, last)))
        indices = [index for _, span in spans for index in span]
        vectors, sums = dict[str, Tensor](), dict[str, Tensor]()
        # Copies: both of the model's heads overwrite the residual, and others of the step read it again.
        index_R = self._device.send(np.array(indices, dtype=np.int64)).to(x_TD.device)
        x_RD, residual_RD = x_TD.index_select(0, index_R), residual_TD.index_select(0, index_R)
        if not self._config.labels:
            hidden_RD = self._model.hidden(x_RD, residual_RD, self._ops) if indices else x_RD
            self._embed(spans, hidden_RD, vectors, sums)
        elif indices:
            self._classify([request for request, span in spans if span], x_RD, residual_RD, vectors)
        return Pooled([LateVectors.of(vectors, self._device.backend)] if vectors else [], sums)

    def keep(self, pooled: Pooled) -> None:
        """Takes over the partial sums of a step that has succeeded."""
        self._sums.update(pooled.sums)

    def _wanted(self, request: ScheduledRequest, last: int) -> range:
        """The tokens of the step whose states this request needs."""
        first = last + 1 - request.num_tokens
        pooling = self._config.pooling
        if self._config.labels:
            pooling = "cls" if self._is_encoder else "last"
        if pooling == "mean":
            return range(first, last + 1)
        if pooling == "cls":
            return range(first, first + (request.num_computed_tokens == 0))
        return range(last, last + request.samples)

    def _embed(
        self,
        spans: Sequence[tuple[ScheduledRequest, range]],
        hidden_RD: Tensor,
        vectors: dict[str, Tensor],
        sums: dict[str, Tensor],
    ) -> None:
        begin = 0
        for request, span in spans:
            request_id, end = request.request_id, begin + len(span)
            sum_D = _wide(hidden_RD[begin:end]).sum(0)
            if request.num_computed_tokens and request_id in self._sums:
                sum_D += self._sums[request_id]
            begin = end
            if request.samples:
                count = request.num_computed_tokens + request.num_tokens if self._config.pooling == "mean" else 1
                vectors[request_id] = self._finished(sum_D / count, self._params[request_id]).float()
            elif span:
                sums[request_id] = sum_D

    def _finished(self, vector_D: Tensor, params: PoolingParams) -> Tensor:
        vector_D = vector_D[: params.dimensions]
        if self._config.normalize if params.normalize is None else params.normalize:
            vector_D = torch.nn.functional.normalize(vector_D, dim=0)
        return vector_D

    def _classify(
        self, requests: Sequence[ScheduledRequest], x_RD: Tensor, residual_RD: Tensor, vectors: dict[str, Tensor]
    ) -> None:
        logits_RL = _wide(self._model.logits(x_RD, residual_RD, self._ops))
        match self._config.activation:
            case "softmax":
                scores_RL = logits_RL.softmax(-1)
            case "sigmoid":
                scores_RL = logits_RL.sigmoid()
            case "identity":
                scores_RL = logits_RL
        for row, request in enumerate(requests):
            shown_RL = scores_RL if self._params[request.request_id].activate else logits_RL
            vectors[request.request_id] = shown_RL[row].float()


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_cpu or x.is_cuda else x.float()  # others may have no float64
