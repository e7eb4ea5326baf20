"""Compiled grammars, each made once: tried out in the worker first, then built here, on a thread beside the engine's.

Owns: the cache of compiled grammars, the worker, the threads that wait for it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import msgspec

from penstock.base.errors import QueueFullError
from penstock.messages import GrammarSpec, Vocabulary
from penstock.structured.backend import GrammarBackend, GrammarError, Matcher
from penstock.structured.closing import ClosingTokens
from penstock.structured.llguidance_backend import LlguidanceBackend
from penstock.structured.prover import GrammarProver

MAX_CACHED: Final = 128
MAX_WAITING: Final = 256
NUM_THREADS: Final = 4
RETRY_AFTER_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """matcher: at the beginning; copies of it are used. num_closing_tokens: see worker.Proof."""

    matcher: Matcher
    tokens: ClosingTokens
    num_closing_tokens: int | None


class GrammarCompiler:
    """Compiles grammars for one model. `start` comes before anything else; the rest may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cache: OrderedDict[GrammarSpec, Future[CompiledGrammar]] = OrderedDict()
        self._num_waiting = 0
        self._vocabulary: Vocabulary | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._parts: Future[tuple[GrammarBackend, ClosingTokens]] | None = None
        self._prover: GrammarProver | None = None

    @property
    def is_started(self) -> bool:
        return self._vocabulary is not None

    def start(self, vocabulary: Vocabulary) -> None:
        """Prepares the library and the worker in the background. A second call changes nothing."""
        if self._vocabulary is not None:
            return
        self._vocabulary = vocabulary
        self._prover = GrammarProver(vocabulary)
        self._threads = ThreadPoolExecutor(NUM_THREADS, "grammar")
        self._parts = self._threads.submit(lambda: (LlguidanceBackend(vocabulary), ClosingTokens(vocabulary)))
        if vocabulary.eos_token_ids:
            self._threads.submit(self._prover.start)
            # The first grammar of a process takes 80 ms more than any other: code is loaded, memory is touched.
            self.compile(GrammarSpec.json_object(), _nothing)

    def compile(self, spec: GrammarSpec, on_done: Callable[[], None]) -> Future[CompiledGrammar]:
        """The grammar, or a GrammarError, now or soon; on_done is called then, on any thread.

        Raises GrammarError (no vocabulary is known), QueueFullError.
        """
        if self._threads is None:
            raise GrammarError("this engine knows no tokenizer, so nothing can be enforced")
        key = msgspec.structs.replace(spec, param="")
        with self._lock:
            future = self._cache.get(key)
            if future is None:
                if self._num_waiting >= MAX_WAITING:
                    raise QueueFullError("Too many grammars wait to be compiled.", retry_after_s=RETRY_AFTER_S)
                self._num_waiting += 1
                future = self._threads.submit(self._compile, spec)
                self._cache[key] = future
                if len(self._cache) > MAX_CACHED:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
        future.add_done_callback(lambda _: on_done())
        return future

    def compiled(self, spec: GrammarSpec) -> CompiledGrammar:
        """The grammar of an admitted request. One that the cache has dropped meanwhile is made again.

        Raises GrammarError, QueueFullError.
        """
        return self.compile(spec, _nothing).result()

    def close(self) -> None:
        """Ends the worker and the threads. What is being compiled is given up."""
        if self._prover is not None:
            self._prover.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, spec: GrammarSpec) -> CompiledGrammar:
        assert self._parts is not None
        assert self._prover is not None
        try:
            backend, tokens = self._parts.result()
            proof = self._prover.prove(spec)
            return CompiledGrammar(backend.compile(proof.text), tokens, proof.num_closing_tokens)
        finally:
            with self._lock:
                self._num_waiting -= 1


def _nothing() -> None:
    pass
