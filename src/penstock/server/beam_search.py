"""A request that asks for the likeliest outputs: from its sequences to finished choices."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from penstock.frontend.beam_search import Beam, BeamSearch, BeamSearchParams, run_beam_search
from penstock.messages import ErrorInfo, FinishReason, RequestOutput
from penstock.server.state import Engine
from penstock.server.text import Sequenced


class BeamSearchFailedError(Exception):
    """A step failed. output: what the engine gave instead of tokens."""

    def __init__(self, output: RequestOutput) -> None:
        super().__init__(output.finish_reason)
        self.output = output

    @property
    def info(self) -> ErrorInfo:
        if self.output.error is not None:
            return self.output.error
        if self.output.finish_reason is FinishReason.TIMEOUT:
            return ErrorInfo("deadline_exceeded", 504, "The request's time was over.")
        return ErrorInfo("aborted", 503, "The search was ended before it was complete.")


async def search_beams(
    engine: Engine, sequences: Sequence[Sequenced], n: int, params: BeamSearchParams
) -> list[RequestOutput]:
    """The n best outputs of each prompt, as the engine would have given them for each sequence.

    sequences: n of each prompt, one behind the other. Raises ValidationError, BeamSearchFailedError.
    """
    searches = [BeamSearch(one.request, params) for one in sequences[::n]]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run_beam_search(engine, search)) for search in searches]
    for task in tasks:
        failed = task.result()
        if failed is not None:
            raise BeamSearchFailedError(failed)
    beams = [beam for search in searches for beam in _padded(search.results(n), n)]
    return [_output(one, beam) for one, beam in zip(sequences, beams, strict=True)]


def _padded(beams: list[Beam], n: int) -> list[Beam]:
    """A vocabulary may be so small that there are fewer outputs than were asked for: then the last stands for them."""
    return [*beams, *[beams[-1]] * (n - len(beams))]


def _output(sequenced: Sequenced, beam: Beam) -> RequestOutput:
    is_stopped = beam.stop_token_id is not None
    return RequestOutput(
        sequenced.request.request_id,
        list(beam.token_ids),
        finish_reason=FinishReason.STOP if is_stopped else FinishReason.LENGTH,
        stop_token_id=beam.stop_token_id,
        num_prompt_tokens=len(sequenced.request.prompt_token_ids),
        num_output_tokens=len(beam.token_ids),
    )
