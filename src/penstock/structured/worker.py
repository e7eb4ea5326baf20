"""Where grammars are tried out before they come near an engine. Started by prover.py.

One process holds the library and the vocabulary and does nothing but fork: every grammar is compiled in a child of its
own, which has so much processor time, time and memory and then dies, whatever the library is doing. The process has
one thread, so forking it is safe.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import select
import signal
import socket
import sys
from typing import Final

import msgspec
import numpy as np
import psutil

from penstock.messages import GrammarSpec, Vocabulary
from penstock.messages.wire import FrameBuffer, frame
from penstock.structured.backend import GrammarError, Matcher
from penstock.structured.closing import ClosingTokens, closing_path
from penstock.structured.llguidance_backend import LlguidanceBackend
from penstock.structured.trials import NICENESS, Trials

MAX_CPU_S: Final = 0.3
MAX_TIME_S: Final = 15.0
MAX_ADDED_BYTES: Final = 512 * 1024 * 1024
MAX_STACK_BYTES: Final = 4 * 1024 * 1024  # half of what a thread of an engine has
# How often those that are running are looked at.
LOOK_S: Final = 0.02
# Beside the way to the end, so many ways are tried: what is costly only inside a document shows itself here.
NUM_WALKS: Final = 3
WALK_TOKENS: Final = 24
PR_SET_PDEATHSIG: Final = 1
RECEIVE_BYTES: Final = 1 << 20


class Proof(msgspec.Struct, array_like=True):
    """A grammar that compiles within the limits, or why it does not.

    text: in the library's language. num_closing_tokens: a way through the whole grammar has so many; None: not found.
    """

    text: str = ""
    num_closing_tokens: int | None = None
    error: str = ""
    remedy: str = ""


def prove(backend: LlguidanceBackend, tokens: ClosingTokens, spec: GrammarSpec, vocab_size: int) -> Proof:
    """Compiles a grammar and walks through it."""
    try:
        text = backend.text(spec)
        backend.check(text)
        matcher = backend.compile(text)
        mask = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        matcher.fill_mask(mask.ctypes.data, mask.nbytes)
        if error := matcher.error():
            return Proof(error=error)
        path = closing_path(matcher, tokens, mask, vocab_size)
        for seed in range(NUM_WALKS):
            _walk(matcher.copy(), mask, random.Random(seed))  # noqa: S311 - a trial, no secret
    except GrammarError as error:
        return Proof(error=error.message, remedy=error.remedy)
    except RecursionError:
        return Proof(error="it nests too deeply")
    return Proof(text, None if path is None else len(path))


def _walk(matcher: Matcher, mask: np.ndarray[tuple[int], np.dtype[np.int32]], chance: random.Random) -> None:
    """Some steps along tokens drawn at random. Raises GrammarError where the library gives up."""
    for _ in range(WALK_TOKENS):
        matcher.fill_mask(mask.ctypes.data, mask.nbytes)
        if error := matcher.error():
            raise GrammarError(error)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if not len(allowed) or matcher.is_complete():
            return
        matcher.consume(int(allowed[chance.randrange(len(allowed))]))


def main() -> int:
    """Serves the socket whose file descriptor is the only argument: a Vocabulary, then one descriptor a grammar."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control = socket.socket(fileno=int(sys.argv[1]))
    body = _receive_frame(control)
    if body is None:
        return 0
    vocabulary = msgspec.msgpack.decode(body, type=Vocabulary)
    backend, tokens = LlguidanceBackend(vocabulary), ClosingTokens(vocabulary)
    os.nice(NICENESS)  # its forks and looks too: a fork copies page tables, and an attack makes many
    try:
        control.sendall(b".")  # ready
    except BrokenPipeError:  # whoever started it has ended meanwhile
        return 0
    trials = Trials(MAX_TIME_S)
    while True:
        if trials:
            trials.look()
            if not select.select([control], [], [], LOOK_S)[0]:
                continue
        data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return 0
        for descriptor in descriptors:
            pid = os.fork()
            if pid == 0:
                control.close()
                _serve_one(backend, tokens, len(vocabulary.token_bytes), socket.socket(fileno=descriptor))
            trials.add(pid)
            os.close(descriptor)


def _serve_one(backend: LlguidanceBackend, tokens: ClosingTokens, vocab_size: int, connection: socket.socket) -> None:
    """The child: reads a GrammarSpec, answers with a Proof, and never returns."""
    try:
        _die_with_parent()
        _limit()
        body = _receive_frame(connection)
        if body is not None:
            spec = msgspec.msgpack.decode(body, type=GrammarSpec)
            proof = prove(backend, tokens, spec, vocab_size)
            connection.sendall(frame(msgspec.msgpack.encode(proof)))
    finally:
        os._exit(0)


def _limit() -> None:
    """Processor time and time end this process by signal; memory makes allocations fail, which ends it too."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    signal.setitimer(signal.ITIMER_REAL, MAX_TIME_S)
    max_bytes = psutil.Process().memory_info().vms + MAX_ADDED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_STACK, (MAX_STACK_BYTES, MAX_STACK_BYTES))
    # What a dying library writes is of no use to anyone.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _receive_frame(connection: socket.socket) -> bytes | None:
    """One frame's body; None at the end of the stream."""
    buffer = FrameBuffer()
    while data := connection.recv(RECEIVE_BYTES):
        bodies = buffer.feed(data)
        if bodies:
            return bodies[0]
    return None


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
