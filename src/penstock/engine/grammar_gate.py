"""Requests whose grammars are not compiled yet. The scheduler hears of a request when everything it needs is there.

Owns: the parked requests.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from penstock.base.errors import PenstockError, QueueFullError
from penstock.messages import EngineRequest, FinishReason, GrammarSpec, RequestOutput, RequestTimings
from penstock.structured import CompiledGrammar, GrammarCompiler, GrammarError

MAX_PARKED = 1024
RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class _Parked:
    request: EngineRequest
    grammar: Future[CompiledGrammar]


class GrammarGate:
    """Holds requests back, in the order in which they came, until their grammars are compiled or refused."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self.compiler = compiler
        self._parked: dict[str, _Parked] = {}
        self._something_done = threading.Event()

    def __len__(self) -> int:
        return len(self._parked)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._parked

    def passes(self, request: EngineRequest) -> bool:
        """Whether the request may go on now; if not, it is parked.

        Raises GrammarError (its grammar is refused), QueueFullError (too many wait).
        """
        spec = request.sampling.grammar
        if spec is None:
            return True
        if len(self._parked) >= MAX_PARKED:
            raise QueueFullError("Too many requests wait for their grammars.", retry_after_s=RETRY_AFTER_S)
        try:
            grammar = self.compiler.compile(spec, self._something_done.set)
        except GrammarError as error:
            raise _named(error, spec) from None
        if grammar.done():
            _raise_refusal(grammar, spec)
            return True
        self._parked[request.request_id] = _Parked(request, grammar)
        return False

    def take_ready(self, now: float) -> tuple[list[EngineRequest], list[tuple[EngineRequest, PenstockError]]]:
        """(requests that may go on, requests that are refused). Those past their deadline count as ready: they end
        where deadlines are kept."""
        ready: list[EngineRequest] = []
        refused: list[tuple[EngineRequest, PenstockError]] = []
        if not self._parked:
            return ready, refused
        self._something_done.clear()
        for request_id, parked in list(self._parked.items()):
            request = parked.request
            is_late = request.deadline_s is not None and now >= request.deadline_s
            if not (parked.grammar.done() or is_late):
                continue
            del self._parked[request_id]
            try:
                if parked.grammar.done():
                    assert request.sampling.grammar is not None
                    _raise_refusal(parked.grammar, request.sampling.grammar)
                ready.append(request)
            except PenstockError as error:
                refused.append((request, error))
        return ready, refused

    def wait(self, timeout_s: float) -> None:
        """Until some grammar is done, but not longer."""
        self._something_done.wait(timeout_s)

    def abort(self, request_ids: Iterable[str], reason: FinishReason, now: float) -> list[RequestOutput]:
        """Final outputs of those that are parked; unknown ids are ignored."""
        found = [self._parked.pop(request_id).request for request_id in set(request_ids) & self._parked.keys()]
        return [
            RequestOutput(
                request.request_id,
                finish_reason=reason,
                num_prompt_tokens=len(request.prompt_token_ids),
                timings=RequestTimings(arrival_s=request.arrival_s, finished_s=now),
            )
            for request in found
        ]


def _raise_refusal(grammar: Future[CompiledGrammar], spec: GrammarSpec) -> None:
    error = grammar.exception()
    if isinstance(error, GrammarError):
        raise _named(error, spec)
    if error is not None:
        raise error


def _named(error: GrammarError, spec: GrammarSpec) -> GrammarError:
    """The refusal of a grammar, with the field that the request had it in."""
    name = spec.param or f"The grammar ({spec.kind.value})"
    return GrammarError(f"{name}: {error.message}.", remedy=error.remedy, param=spec.param or None)
