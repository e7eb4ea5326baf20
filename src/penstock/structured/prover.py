"""The engine's side of worker.py.

Owns: the worker process.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from typing import Final

import msgspec

from penstock.messages import GrammarSpec, Vocabulary
from penstock.messages.wire import FrameBuffer, frame
from penstock.structured.backend import GrammarError
from penstock.structured.worker import MAX_CPU_S, MAX_TIME_S, RECEIVE_BYTES, Proof

START_S: Final = 60.0
GRACE_S: Final = 2.0


class GrammarProver:
    """Tries grammars out in a process that may die of them. Safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        # Which tokens spell a text makes no difference to whether and how fast a grammar compiles.
        self._vocabulary = msgspec.structs.replace(vocabulary, tokenizer="")
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Starts the worker if it does not run, and waits until it can be used."""
        with self._lock:
            self._running()

    def prove(self, spec: GrammarSpec) -> Proof:
        """Raises GrammarError: it is not valid, cannot be enforced, or takes too long or too much."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs, self._lock:
                self._hand_over(theirs)
            ours.settimeout(MAX_TIME_S + GRACE_S)
            body = _exchange(ours, frame(msgspec.msgpack.encode(spec)))
        if body is None:
            raise GrammarError(
                f"it does not compile within {MAX_CPU_S:g} seconds of processor time and the memory that it may use",
                remedy="Make it smaller: fewer alternatives, smaller counts, less nesting.",
            )
        proof = msgspec.msgpack.decode(body, type=Proof)
        if proof.error:
            raise GrammarError(proof.error, remedy=proof.remedy)
        return proof

    def close(self) -> None:
        """Ends the worker (idempotent)."""
        with self._lock:
            self._stop()

    def _hand_over(self, connection: socket.socket) -> None:
        try:
            socket.send_fds(self._running(), [b"+"], [connection.fileno()])
        except OSError:  # it died; one more is worth a try
            self._stop()
            socket.send_fds(self._running(), [b"+"], [connection.fileno()])

    def _running(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "penstock.structured", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        ours.settimeout(START_S)
        ours.sendall(frame(msgspec.msgpack.encode(self._vocabulary)))
        if not ours.recv(1):
            raise OSError("the process that tries out grammars did not start")
        self._control = ours
        return ours

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _exchange(connection: socket.socket, request: bytes) -> bytes | None:
    """The answer's body; None when the other side died or stayed silent."""
    buffer = FrameBuffer()
    with contextlib.suppress(OSError):
        connection.sendall(request)
        while data := connection.recv(RECEIVE_BYTES):
            bodies = buffer.feed(data)
            if bodies:
                return bodies[0]
    return None
