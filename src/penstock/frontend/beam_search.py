"""Beam search: the likeliest whole outputs, found by keeping several and continuing each one token at a time.

Each step is a batch of ordinary requests for one token with its likeliest alternatives. What they share of their tokens
they find in the prefix cache, so a beam that forks costs no more than one that goes on. Scores and the rules for
stopping are those of transformers' `generate(num_beams=...)`, against which it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from penstock.base.errors import ValidationError
from penstock.messages import EngineRequest, FinishReason, RequestOutput, SamplingParams, TokenLogprobs
from penstock.messages.bounds import BOUNDS
from penstock.messages.sampling import check_bound


@dataclass(frozen=True)
class BeamSearchParams:
    """width: outputs that are kept. length_penalty: the power of its length by which an output's log-probability is
    divided; above 0 favours long ones. early_stopping: end as soon as `width` outputs are complete, instead of when no
    better one is to be expected."""

    width: int
    length_penalty: float = 1.0
    early_stopping: bool = False

    def validate(self) -> None:
        """Raises ValidationError naming the field."""
        check_bound("beam_width", self.width)
        check_bound("length_penalty", self.length_penalty)


@dataclass(frozen=True)
class Beam:
    """An output. logprob: the sum over its tokens, the one that ended it included. score: what it is ranked by.

    stop_token_id: the token that ended it, which is the last of token_ids; None where max_tokens did.
    """

    token_ids: tuple[int, ...]
    logprob: float
    score: float = 0.0
    stop_token_id: int | None = None


class BeamSearch:
    """One search. Pass it, step by step, what the engine gave for the live beams."""

    def __init__(self, request: EngineRequest, params: BeamSearchParams) -> None:
        """request: for one output, as `Processor.engine_requests` makes it. Raises ValidationError."""
        params.validate()
        self._request = request
        self._params = params
        self._num_candidates = params.width + len(request.stop_token_ids)
        most = int(BOUNDS["logprobs"][1])
        if self._num_candidates > most:
            raise ValidationError(
                f"A beam width of {params.width} with {len(request.stop_token_ids)} stop tokens exceeds {most}.",
                param="n",
            )
        self._live = [Beam((), 0.0)]
        self._finished: list[Beam] = []
        self._num_steps = 0

    def requests(self) -> list[EngineRequest]:
        """One for each live beam; none when the search is over."""
        # Stop tokens are weighed like any other, and greedily drawn tokens are thrown away.
        sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=self._num_candidates)
        return [
            msgspec.structs.replace(
                self._request,
                request_id=f"{self._request.request_id}-{self._num_steps}-{index}",
                prompt_token_ids=[*self._request.prompt_token_ids, *beam.token_ids],
                sampling=sampling,
                max_tokens=1,
                stop_token_ids=(),
            )
            for index, beam in enumerate(self._live)
        ]

    def advance(self, found: Sequence[TokenLogprobs]) -> None:
        """found: what may follow each live beam."""
        self._num_steps += 1
        width, is_last = self._params.width, self._num_steps == self._request.max_tokens
        candidates = [
            Beam((*beam.token_ids, token_id), beam.logprob + logprob)
            for beam, after in zip(self._live, found, strict=True)
            for token_id, logprob in zip(after.top_ids, after.top_logprobs, strict=True)
        ]
        candidates.sort(key=lambda beam: -beam.logprob)
        self._live = []
        for rank, beam in enumerate(candidates):
            is_stopped = beam.token_ids[-1] in self._request.stop_token_ids
            if not is_stopped and not is_last:
                if len(self._live) < width:
                    self._live.append(beam)
            elif rank < width:  # what ends further down is beaten by outputs that go on
                stop_token_id = beam.token_ids[-1] if is_stopped else None
                self._finished.append(Beam(beam.token_ids, beam.logprob, self._score(beam.logprob), stop_token_id))
        self._finished = self.results(width)
        if len(self._finished) == width and self._live and not self._can_improve():
            self._live = []

    def results(self, num: int) -> list[Beam]:
        """The best outputs so far, best first."""
        return sorted(self._finished, key=lambda beam: -beam.score)[:num]

    def _can_improve(self) -> bool:
        if self._params.early_stopping:
            return False
        return self._score(self._live[0].logprob) > self._finished[-1].score

    def _score(self, logprob: float) -> float:
        """Of an output that is as long as the search has come."""
        return logprob / float(self._num_steps**self._params.length_penalty)


class _Stream(Protocol):
    async def __anext__(self) -> RequestOutput: ...


class _Engine(Protocol):
    """What frontend.EngineClient is to a search."""

    def submit(self, request: EngineRequest) -> _Stream: ...

    def abort(self, request_ids: list[str], finish_reason: FinishReason = FinishReason.ABORT) -> None: ...


async def run_beam_search(engine: _Engine, search: BeamSearch) -> RequestOutput | None:
    """Runs a search to its end. The output that says why, where a step failed."""
    while requests := search.requests():
        streams = [engine.submit(request) for request in requests]
        try:
            outputs = [await stream.__anext__() for stream in streams]
        except BaseException:
            engine.abort([request.request_id for request in requests])
            raise
        for output in outputs:
            if not output.logprobs:
                engine.abort([request.request_id for request in requests])
                return output
        search.advance([output.logprobs[0] for output in outputs if output.logprobs])
    return None
