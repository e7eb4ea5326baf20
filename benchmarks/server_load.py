#!/usr/bin/env python3
"""A cheap load client for OpenAI-compatible completions: closed loop, raw HTTP/1.1, no JSON while it measures.

    server_load.py --url http://127.0.0.1:8000 --requests 32 --concurrency 16 --prompt-len 128 --output-len 64

It shares the cores with the server that it measures, so requests are built beforehand, the bytes that come are only cut
into events and stamped, and everything else waits until the clock has stopped. Prompts are random token ids. Prints one
JSON object; its own share of CPU time is in it.

Definitions. TTFT: from writing the request to the first event with a choice. ITL: the gaps between events with a
choice, over all requests. TPOT: per request, (last - first event) / (tokens - 1). Tokens are those of the server's
`usage`. A stream counts only if it brought a finish_reason, [DONE] and exactly the tokens asked for; others are
failures, with an infinite TTFT in the percentiles.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import math
import random
import resource
import statistics
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

FIRST_PLAIN_TOKEN = 16


@dataclass
class Exchange:
    """One request and what came back: (seconds, bytes) of each event, or of the whole body without streaming."""

    sent: float
    status: int = 0
    ended: float = 0.0
    events: list[tuple[float, bytes]] = field(default_factory=list)
    broken: str = ""


class Load:
    """The requests still to send and the exchanges done; one for all connections of a run."""

    def __init__(self, requests: list[bytes]) -> None:
        self.left = collections.deque(requests)
        self.exchanges: list[Exchange] = []
        self.in_flight = 0
        self.finished = asyncio.get_running_loop().create_future()

    def next_request(self) -> bytes | None:
        if not self.left:
            if self.in_flight == 0 and not self.finished.done():
                self.finished.set_result(None)
            return None
        self.in_flight += 1
        return self.left.popleft()

    def done(self, exchange: Exchange) -> None:
        self.in_flight -= 1
        self.exchanges.append(exchange)


class Connection(asyncio.Protocol):
    """A keep-alive connection that sends the next request as soon as a response has ended."""

    def __init__(self, load: Load, reconnect: Any) -> None:
        self._load = load
        self._reconnect = reconnect
        self._exchange: Exchange | None = None
        self._buffer = b""
        self._in_body = False
        self._is_chunked = False
        self._length = 0
        self._partial = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not subclasses of asyncio.Transport.
        self._transport = cast(asyncio.Transport, transport)

    def send_next(self) -> None:
        request = self._load.next_request()
        if request is None:
            self._transport.close()
            return
        self._buffer = self._partial = b""
        self._in_body = False
        self._exchange = Exchange(time.perf_counter())
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        exchange = self._exchange
        if exchange is None:
            return
        self._buffer = self._buffer + data if self._buffer else data
        if not self._in_body and not self._read_head(exchange):
            return
        is_complete = self._read_chunks(exchange, now) if self._is_chunked else self._read_plain(exchange, now)
        if is_complete:
            self._finish(now, "")

    def _read_head(self, exchange: Exchange) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self._buffer[:end].lower()
        self._buffer = self._buffer[end + 4 :]
        exchange.status = int(head[9:12])
        self._is_chunked = b"transfer-encoding: chunked" in head
        self._length = 0
        if not self._is_chunked:
            start = head.index(b"content-length:") + 15
            self._length = int(head[start:].split(b"\r\n", 1)[0])
        self._in_body = True
        return True

    def _read_plain(self, exchange: Exchange, now: float) -> bool:
        if len(self._buffer) < self._length:
            return False
        exchange.events.append((now, self._buffer))
        return True

    def _read_chunks(self, exchange: Exchange, now: float) -> bool:
        """Takes whole chunks off the buffer; True at the last one."""
        buffer, place = self._buffer, 0
        while True:
            line_end = buffer.find(b"\r\n", place)
            if line_end < 0:
                break
            size = int(buffer[place:line_end], 16)
            end = line_end + 2 + size
            if len(buffer) < end + 2:
                break
            if size == 0:
                return True
            self._read_events(exchange, buffer[line_end + 2 : end], now)
            place = end + 2
        self._buffer = buffer[place:]
        return False

    def _read_events(self, exchange: Exchange, body: bytes, now: float) -> None:
        """A chunk is one event nearly always; events that are split or joined are cut at their blank line."""
        if self._partial:
            body = self._partial + body
            self._partial = b""
        if body.count(b"\n\n") == 1 and body.endswith(b"\n\n"):
            exchange.events.append((now, body))
            return
        *whole, self._partial = body.split(b"\n\n")
        exchange.events += [(now, event) for event in whole if event]

    def _finish(self, now: float, broken: str) -> None:
        assert self._exchange is not None
        self._exchange.ended = now
        self._exchange.broken = broken
        self._load.done(self._exchange)
        self._exchange = None
        if not broken:
            self.send_next()

    def connection_lost(self, error: Exception | None) -> None:
        if self._exchange is not None:
            self._finish(time.perf_counter(), f"the connection was closed: {error}")
            self._reconnect()


async def run_load(host: str, port: int, requests: list[bytes], concurrency: int) -> list[Exchange]:
    """Sends all requests over `concurrency` connections, opened before the first one is sent."""
    loop = asyncio.get_running_loop()
    load = Load(requests)
    pending: set[asyncio.Task[Connection]] = set()

    async def connect() -> Connection:
        _, protocol = await loop.create_connection(lambda: Connection(load, reconnect), host, port)
        return protocol

    def reconnected(task: asyncio.Task[Connection]) -> None:
        pending.discard(task)
        if (error := task.exception()) is None:
            task.result().send_next()
        elif not load.finished.done():
            load.finished.set_exception(error)

    def reconnect() -> None:
        task = asyncio.ensure_future(connect())
        pending.add(task)
        task.add_done_callback(reconnected)

    connections = [await connect() for _ in range(min(concurrency, len(requests)))]
    for connection in connections:
        connection.send_next()
    await load.finished
    return load.exchanges


def build_requests(options: argparse.Namespace, model: str, host: str) -> list[bytes]:
    """Complete HTTP requests; with --shared-prefix all prompts of the run begin with the same random tokens."""
    generator = random.Random(options.seed)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(FIRST_PLAIN_TOKEN, options.token_limit) for _ in range(count)]

    prefix = tokens(options.shared_prefix)
    generator.seed(options.seed * 1_000_003 + options.part)
    requests = []
    for _ in range(options.requests):
        body: dict[str, Any] = {
            "model": model,
            "prompt": prefix + tokens(options.prompt_len - options.shared_prefix),
            "max_tokens": options.output_len,
            "temperature": 0,
            "ignore_eos": True,
        }
        if options.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        payload = json.dumps(body, separators=(",", ":")).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        requests.append(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    return requests


@dataclass
class Outcome:
    """An exchange, read: times in seconds, tokens as the server counts them; failure is empty for a good one."""

    ttft: float = math.inf
    end_to_end: float = math.inf
    gaps: list[float] = field(default_factory=list)
    tpot: float | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    failure: str = ""


def read_exchange(exchange: Exchange, is_stream: bool, output_len: int) -> Outcome:
    """What a caller would have seen of it."""
    if exchange.broken or exchange.status != 200:
        shown = exchange.events[0][1][:300].decode(errors="replace") if exchange.events else ""
        return Outcome(failure=exchange.broken or f"status {exchange.status}: {shown}")
    outcome = _read_stream(exchange) if is_stream else _read_body(exchange)
    if not outcome.failure and outcome.tokens != output_len:
        outcome.failure = f"{outcome.tokens} tokens instead of {output_len}"
    if outcome.failure:
        outcome.ttft = math.inf
    return outcome


def _read_body(exchange: Exchange) -> Outcome:
    body = json.loads(exchange.events[0][1])
    usage, choice = body["usage"], body["choices"][0]
    took = exchange.ended - exchange.sent
    outcome = Outcome(
        ttft=took, end_to_end=took, tokens=usage["completion_tokens"], prompt_tokens=usage["prompt_tokens"]
    )
    if not choice["finish_reason"]:
        outcome.failure = "no finish_reason"
    return outcome


def _read_stream(exchange: Exchange) -> Outcome:
    times, usage, finish_reason, is_done = [], None, None, False
    for moment, event in exchange.events:
        data = event.strip().removeprefix(b"data:").strip()
        if data == b"[DONE]":
            is_done = True
            continue
        chunk = json.loads(data)
        usage = chunk.get("usage") or usage
        if chunk.get("choices"):
            times.append(moment)
            finish_reason = chunk["choices"][0].get("finish_reason") or finish_reason
    if not (is_done and finish_reason and usage and times):
        return Outcome(failure=f"cut stream: done {is_done}, finish_reason {finish_reason}, usage {usage}")
    outcome = Outcome(times[0] - exchange.sent, exchange.ended - exchange.sent)
    outcome.gaps = [after - before for before, after in itertools.pairwise(times)]
    outcome.tokens, outcome.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
    if outcome.tokens > 1:
        outcome.tpot = (times[-1] - times[0]) / (outcome.tokens - 1)
    return outcome


def percentile(values: list[float], share: float) -> float | None:
    """Nearest rank; None of nothing or of an infinite value."""
    if not values:
        return None
    value = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    return value if math.isfinite(value) else None


def summarise(exchanges: list[Exchange], options: argparse.Namespace) -> dict[str, Any]:
    """The run's figures; seconds unless a name says otherwise."""
    outcomes = [read_exchange(exchange, options.stream, options.output_len) for exchange in exchanges]
    good = [outcome for outcome in outcomes if not outcome.failure]
    start, end = min(exchange.sent for exchange in exchanges), max(exchange.ended for exchange in exchanges)
    tokens = sum(outcome.tokens for outcome in good)
    ttft = [outcome.ttft for outcome in outcomes]
    gaps = [gap for outcome in good for gap in outcome.gaps]
    tpots = [outcome.tpot for outcome in good if outcome.tpot is not None]
    return {
        "requests": len(outcomes),
        "failures": collections.Counter(outcome.failure for outcome in outcomes if outcome.failure),
        "wall": end - start,
        "output_tokens": tokens,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in good),
        "output_tokens_per_s": tokens / (end - start),
        "requests_per_s": len(good) / (end - start),
        "ttft_p50": percentile(ttft, 0.50),
        "ttft_p99": percentile(ttft, 0.99),
        "itl_p50": percentile(gaps, 0.50),
        "itl_p99": percentile(gaps, 0.99),
        "tpot_p50": percentile(tpots, 0.50),
        "end_to_end_p50": percentile([outcome.end_to_end for outcome in outcomes], 0.50),
        "tokens_per_event": tokens / max(1, len(gaps) + len(good)) if options.stream else None,
        "end_to_end_mean": statistics.fmean(outcome.end_to_end for outcome in good) if good else None,
    }


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens, the shared prefix included")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--shared-prefix", type=int, default=0, help="the prefix is drawn from --seed alone")
    parser.add_argument("--no-stream", dest="stream", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=int, default=0, help="another part: the same prefix, other ends")
    parser.add_argument("--token-limit", type=int, default=2000, help="prompts hold ids below this")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    url = urlsplit(options.url)
    assert url.hostname is not None
    with urllib.request.urlopen(f"{options.url}/v1/models", timeout=30) as response:
        model = json.load(response)["data"][0]["id"]
    requests = build_requests(options, model, url.netloc)
    try:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    before = cpu_seconds()
    with runner:
        exchanges = runner.run(run_load(url.hostname, url.port or 80, requests, options.concurrency))
    spent = cpu_seconds() - before
    summary = summarise(exchanges, options)
    summary["client_cpu"] = spent
    summary["client_cpu_share_of_a_core"] = spent / summary["wall"]
    print(json.dumps(summary))
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
