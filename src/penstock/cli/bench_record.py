"""`penstock bench record`: a recording proxy before any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import asyncio
import signal

from penstock.base.errors import ConfigError
from penstock.bench.datasets import token_ids_of
from penstock.bench.measure import run_loop
from penstock.bench.recording_proxy import MAX_HEAD_BYTES, RecordingProxy, tokens_of_bytes
from penstock.bench.target import Target
from penstock.config.defaults import is_loopback
from penstock.observability.traffic import TraceHeader, TrafficRecorder


def bench_record(options: argparse.Namespace) -> int:
    """Serves until a signal; the exit status."""
    if not is_loopback(options.host):
        raise ConfigError(f"--host {options.host} would let others use {options.url}.", remedy="Listen on 127.0.0.1.")
    target = Target.of(options.url, "")
    if target.is_tls:
        raise ConfigError("The proxy speaks plain HTTP to its server.", remedy="Name an http:// URL.")
    tokenizer = str(options.tokenizer) if options.tokenizer else "4 bytes each"
    header = TraceHeader(has_contents=options.contents, tokenizer=tokenizer, source="proxy")
    recorder = TrafficRecorder(options.directory, header)
    token_ids = token_ids_of(options.tokenizer) if options.tokenizer else tokens_of_bytes
    proxy = RecordingProxy(target, recorder, token_ids)

    async def serve() -> None:
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        server = await asyncio.start_server(proxy.handle, options.host, options.port, limit=MAX_HEAD_BYTES)
        port = server.sockets[0].getsockname()[1]
        print(f"Recording what passes http://{options.host}:{port} to {target.url} in {recorder.path}", flush=True)
        async with server:
            await stopped.wait()

    try:
        run_loop(serve)
    finally:
        recorder.close()
    return 0
