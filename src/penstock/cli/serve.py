"""`penstock serve`: listen, load, print where the time went, answer until told to stop.

The order is for a quick start: the port is taken first, then the engine process is started, and only while that
imports torch does this process import the HTTP stack and the tokenizer.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import psutil

from penstock import __version__
from penstock.cli.checkpoint import engine_config, find_checkpoint, model_names
from penstock.config.engine import EngineConfig
from penstock.config.settings import SPECS, ResolvedSettings
from penstock.frontend.engine_client import EngineClient
from penstock.loader.gguf_file import split_paths
from penstock.messages import EngineReady, StartupProgress
from penstock.observability.logs import LogSink
from penstock.observability.phases import PhaseTimer
from penstock.server.listen import bind, url_of

if TYPE_CHECKING:
    from penstock.observability.traffic import TrafficRecorder
    from penstock.server.model_text import TextParts
    from penstock.server.state import Engine, ServerState
    from penstock.server.text import TextLayer

# A checkpoint that is here is found at once; a download goes on beside the imports.
FIND_S: Final = 0.25


def serve(resolved: ResolvedSettings) -> int:
    """Runs a server until a signal ends it; the exit status."""
    sink = LogSink(resolved.values.log_format)
    sink.install(resolved.values.log_level)
    start = ServerStart(resolved, sink)
    try:
        run_loop(start.run(lambda: print("\n".join(start.report()), flush=True), _stop_on_signals))
    finally:
        sink.close()
    return 0


def run_loop(coroutine: Coroutine[Any, Any, None]) -> None:
    """asyncio.run on uvloop, where there is one."""
    if sys.platform == "win32":
        asyncio.run(coroutine)
        return
    import uvloop

    uvloop.run(coroutine)


def _stop_on_signals(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


class ServerStart:
    """Puts the parts of one server together, and knows where the time of its start went."""

    def __init__(self, resolved: ResolvedSettings, sink: LogSink) -> None:
        self._resolved = resolved
        self._settings = resolved.values
        self._sink = sink
        self._progress = _ProgressLine()
        # Everything since the process began: the interpreter's own start is time that a user waits, too.
        age_s = time.time() - psutil.Process().create_time()
        self._phases = PhaseTimer("start Python", time.perf_counter() - age_s)
        self._config: EngineConfig | None = None
        self._ready: EngineReady | None = None
        self._text_parts: asyncio.Task[TextParts] | None = None
        self.model_name = model_names(self._settings)[0]
        self.url = ""

    async def run(self, on_ready: Callable[[], None], on_stoppable: Callable[[Callable[[], None]], None]) -> None:
        """Serves until stopped. on_stoppable: is given the function that stops it, to be called in this loop."""
        self._phases.begin("find checkpoint")
        bound = bind(self._settings)
        self.url = url_of(bound)
        found = asyncio.Event()
        first_engine = asyncio.create_task(self._start_engine(found))
        finding = asyncio.create_task(found.wait())
        await asyncio.wait((finding, first_engine), timeout=FIND_S, return_when=asyncio.FIRST_COMPLETED)
        finding.cancel()
        # From here on the engine process is importing torch (or the checkpoint is being downloaded).
        from penstock.observability.metrics import ServerInfo
        from penstock.server.app import build_app
        from penstock.server.http_server import HttpServer
        from penstock.server.lifecycle import Lifecycle
        from penstock.server.state import ServerState

        info = ServerInfo(version=__version__, model=self.model_name)
        state = ServerState(self._settings, model_names(self._settings), info, log_sink=self._sink)
        state.recorder = self._recorder()
        engines = [first_engine]

        def ready() -> None:
            self._phases.end()
            on_ready()

        lifecycle = Lifecycle(
            state,
            HttpServer(build_app(state), bound, self._settings.client_timeout),
            start_engine=lambda: engines.pop() if engines else self._start_engine(asyncio.Event()),
            load_text=lambda engine: self._load_text(engine, state),
            on_ready=ready,
        )
        on_stoppable(lifecycle.stop)
        try:
            await lifecycle.run()
        finally:
            if state.recorder is not None:
                state.recorder.close()

    def _recorder(self) -> TrafficRecorder | None:
        """Raises ConfigError when the directory cannot be written."""
        settings = self._settings
        if not settings.record:
            return None
        from penstock.observability.traffic import TraceHeader, TrafficRecorder

        header = TraceHeader(model=self.model_name, has_contents=settings.record_contents, source="serve")
        return TrafficRecorder(Path(settings.record), header)

    async def _start_engine(self, found: asyncio.Event) -> Engine:
        """found: set when the engine process has been started."""
        path = await asyncio.to_thread(find_checkpoint, self._settings)
        # What was recorded is played again by a simulator, too: that needs to know what steps take.
        self._config = msgspec.structs.replace(engine_config(self._settings, path), step_log=self._settings.record)
        self._phases.begin("start engine process")
        starting = asyncio.create_task(EngineClient.start(self._config, self._progress.show))
        await asyncio.sleep(0.005)  # the process is spawned, its configuration written
        self._text_parts = asyncio.create_task(asyncio.to_thread(_load_text_parts, path))
        found.set()
        try:
            client = await starting
        finally:
            self._progress.clear()
        self._phases.end(client.ready.phases)
        self._ready = client.ready
        return client

    async def _load_text(self, engine: Engine, state: ServerState) -> TextLayer:
        from penstock.frontend.one_pass import ModelTasks
        from penstock.observability.metrics import ServerInfo
        from penstock.server.model_text import ModelText

        assert self._text_parts is not None
        assert self._config is not None
        self._phases.begin("wait for tokenizer")  # it was loaded beside the engine
        parts = await self._text_parts
        ready = engine.ready
        engine.send(parts.vocabulary.of_size(ready.vocab_size))
        state.info = ServerInfo(
            version=__version__, model=self.model_name, dtype=ready.dtype, instruction_set=ready.instruction_set
        )
        state.facts = parts.facts
        state.system_fingerprint = fingerprint(
            Path(self._config.model_path), ready,
            f"{self._config.quantization} {self._config.activations} {self._config.cache.dtype}",
        )  # fmt: skip
        return ModelText(parts, ready.max_model_len, ready.vocab_size, ModelTasks.of(ready))

    def report(self) -> list[str]:
        """Memory, how weights are held, what was chosen, where the time went, and the address. Once ready."""
        assert self._ready is not None
        assert self._config is not None
        ready = self._ready
        lines = ["memory:", *(f"  {line}" for line in ready.memory_table.splitlines())]
        lines += ["weights:", *(f"  {line}" for line in ready.weights_table.splitlines())]
        chosen = choices(self._resolved, self._config, ready)
        lines += ["chosen:", *(f"  {name} = {value}" for name, value in chosen.items())]
        lines += ["start:", *(f"  {line}" for line in self._phases.table())]
        return [*lines, f"{self.model_name} is served at {self.url}/v1 ({ready.dtype}, {ready.instruction_set})"]


def _load_text_parts(path: Path) -> TextParts:
    from penstock.server.model_text import TextParts

    return TextParts(path)


class _ProgressLine:
    """The engine's start-up on one line of a terminal; nothing where standard error is no terminal."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()

    def show(self, progress: StartupProgress) -> None:
        if self._is_terminal:
            bar = "#" * round(progress.fraction * 30)
            sys.stderr.write(f"\r\x1b[K{progress.phase} [{bar:<30}] {progress.fraction:4.0%} {progress.detail}")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._is_terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def choices(resolved: ResolvedSettings, config: EngineConfig, ready: EngineReady) -> dict[str, str]:
    """What the settings left open (or a limit changed), and what it became."""
    became = {
        "dtype": ready.dtype,
        "load_format": config.load_format,
        "max_model_len": str(ready.max_model_len),
        "num_threads": str(config.num_threads),
        "kernels": config.kernels,
        "max_num_batched_tokens": str(ready.max_num_batched_tokens),
    }
    values = resolved.values
    return {name: value for name, value in became.items() if SPECS[name].show(getattr(values, name)) != value}


def fingerprint(path: Path, ready: EngineReady, rounding: str = "") -> str:
    """Changes with whatever may change an answer: version, weights, tokenizer, template, dtype, kernels, rounding.

    Files count by name, size and time of change: reading the weights once more would double the start.
    """
    digest = hashlib.sha256(
        f"{__version__} {ready.dtype} {ready.instruction_set} {ready.max_model_len} {rounding}".encode()
    )
    for file in split_paths(path) if path.is_file() else sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".json", ".jinja", ".model", ".gguf"):
            facts = file.stat()
            digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    return f"fp_{digest.hexdigest()[:16]}"
