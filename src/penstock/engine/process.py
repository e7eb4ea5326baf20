"""The engine process: EngineCore behind a socket. Started by frontend.EngineClient as `python -m penstock.engine`.

The socket is one end of a socketpair inherited from the parent: no path, no port, nobody else can connect, and its
end of file is the news that the parent died.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import select
import signal
import socket
import sys
import time

import msgspec

from penstock.base.errors import DeviceLostError, PenstockError
from penstock.config.engine import EngineConfig
from penstock.engine.build import build_engine
from penstock.engine.core import EngineCore
from penstock.messages import (
    AbortRequest,
    EngineFatal,
    EngineInput,
    EngineMessage,
    EngineRequest,
    ErrorInfo,
    OutputBatch,
    RequestOutput,
    ShutdownRequest,
    StartupProgress,
    Vocabulary,
)
from penstock.messages.wire import FrameBuffer, decode_input, encode_frame

logger = logging.getLogger(__name__)

IDLE_STATS_S = 1.0
RECEIVE_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1


class ParentGoneError(Exception):
    """The other end of the socket closed."""


class Channel:
    """The engine's end of the socket. Writes never block the loop: what does not fit waits in `_unsent`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._frames = FrameBuffer()
        self._unsent = bytearray()

    def receive_frames(self, timeout_s: float | None) -> list[bytes]:
        """Frame bodies that arrived, waiting up to timeout_s for the first. Raises ParentGoneError at the end."""
        events = select.POLLIN | (select.POLLOUT if self._unsent else 0)
        poll = select.poll()
        poll.register(self._connection, events)
        if not poll.poll(None if timeout_s is None else timeout_s * 1000):
            return []
        self._flush()
        bodies: list[bytes] = []
        while True:
            try:
                data = self._connection.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return bodies
            except OSError:
                raise ParentGoneError from None
            if not data:
                raise ParentGoneError
            bodies += self._frames.feed(data)
            if len(data) < RECEIVE_BYTES:
                return bodies

    def send(self, message: EngineMessage) -> None:
        self._unsent += encode_frame(message)
        self._flush()

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._connection.send(self._unsent)
            except BlockingIOError:
                return
            except OSError:
                raise ParentGoneError from None
            del self._unsent[:sent]


class EngineServer:
    """Moves messages between the channel and the core until it is told to stop."""

    def __init__(self, channel: Channel, core: EngineCore) -> None:
        self._channel = channel
        self._core = core
        self._stop_at_s: float | None = None
        self._stats_sent_s = 0.0
        self._is_checked = True
        self._is_preparing = True

    def run(self) -> None:
        while not self._is_finished():
            is_busy = self._core.has_work()
            bodies = self._channel.receive_frames(0.0 if is_busy or self._is_preparing else IDLE_STATS_S)
            outputs = [output for body in bodies for output in self._handle(decode_input(body))]
            if self._core.has_work():
                outputs += self._core.step()
                self._is_checked = False
                self._is_preparing = False
            elif not bodies and not is_busy:  # idle for a whole IDLE_STATS_S, or between two preparations
                if not self._is_checked:
                    self._core.check()
                    self._is_checked = True
                self._is_preparing = self._core.prepare()
            now = time.monotonic()
            if outputs or now - self._stats_sent_s >= IDLE_STATS_S:
                self._channel.send(OutputBatch(outputs, self._core.stats()))
                self._stats_sent_s = now

    def _handle(self, message: EngineInput) -> list[RequestOutput]:
        match message:
            case EngineRequest():
                refusal = self._core.add(message)
                return [refusal] if refusal is not None else []
            case AbortRequest():
                return self._core.abort(message.request_ids, message.finish_reason)
            case Vocabulary():
                self._core.set_vocabulary(message)
                return []
            case ShutdownRequest():
                self._stop_at_s = time.monotonic() + message.drain_s
                return []

    def _is_finished(self) -> bool:
        if self._stop_at_s is None:
            return False
        return not self._core.has_work() or time.monotonic() >= self._stop_at_s


def main() -> int:
    """Serves the socket whose file descriptor is the only argument; the first frame is the EngineConfig."""
    # A terminal's Ctrl-C reaches the whole process group; only the parent decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    try:
        core = _start(channel)
        if core is None:
            return 1
        _quiet_the_collector()
        EngineServer(channel, core).run()
        core.close()
    except ParentGoneError:
        return 0
    except DeviceLostError as error:
        logger.error("%s", error)
        return 1
    return 0


def _start(channel: Channel) -> EngineCore | None:
    """Builds the engine and says so; a failure is sent as EngineFatal with its one line of cause and remedy."""
    while not (bodies := channel.receive_frames(None)):
        pass
    config = msgspec.json.decode(bodies[0], type=EngineConfig)
    try:
        core, ready = build_engine(
            config, lambda phase, fraction: channel.send(StartupProgress(phase=phase, fraction=fraction))
        )
    except PenstockError as error:
        channel.send(EngineFatal(ErrorInfo.of(error)))
        return None
    except Exception as error:
        logger.exception("The engine could not start")
        channel.send(EngineFatal(ErrorInfo("engine_start_failed", 500, f"{type(error).__name__}: {error}")))
        return None
    channel.send(ready)
    return core


def _quiet_the_collector() -> None:
    """What start-up made stays: it is not looked at again. The rest holds few cycles, and a full collection over
    10,000 queued requests takes 25 to 100 ms, so those become rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 1_000)


def _die_with_parent() -> None:
    """Asks Linux for SIGKILL when the parent dies, so that kill -9 of it leaves no orphan holding memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
