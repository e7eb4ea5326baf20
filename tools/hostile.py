"""A hostile hour in miniature: thousands of broken, absurd and vanishing requests around streams that must not notice.

    python tools/hostile.py [--requests 5000] [--model DIR]

Starts `penstock serve`, records a set of healthy streams undisturbed, then mixes them with bad JSON, absurd numbers,
huge strings, deep nesting, wrong types, aborts in every phase and disconnects in mid-stream. Fails unless: the engine's
process id is unchanged, every healthy stream equals its undisturbed twin, every bad request got its 4xx, nothing was a
5xx, the block pool is whole again with all invariants holding, and memory is back at its level.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp
import psutil

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MODEL = "served"
PROMPTS = [
    "Hello! Who are you?",
    "What can you tell me about the canal?",
    "Count from one to five.",
    "Thank you, that was kind.",
    "Please tell me a little about the village.",
    "What is your name?",
    "Good morning, how are you today?",
    "Tell me about the dam.",
]
RSS_SLACK_BYTES = 64 * 1024 * 1024


@dataclass
class Report:
    """What happened. `problems` is empty after a good run."""

    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    num_healthy: int = 0

    def expect(self, condition: bool, problem: str) -> None:
        if not condition:
            self.problems.append(problem)


def healthy_body(index: int) -> dict[str, object]:
    """The body of healthy request `index`: greedy and seeded ones alternate; lengths differ."""
    body: dict[str, object] = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": f"You are guide number {index}. The gate opens at {index % 12 + 1}."},
            {"role": "user", "content": PROMPTS[index % len(PROMPTS)]},
        ],
        "max_tokens": 24 + 8 * (index % 5),
        "stream": True,
    }
    if index % 2:
        body |= {"temperature": 1.0, "seed": index, "top_p": 0.95}
    else:
        body |= {"temperature": 0}
    return body


async def read_stream(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> str:
    """The concatenated content of a stream; raises when it does not end with a finish reason and [DONE]."""
    text, is_finished, is_done = [], False, False
    async with session.post(url + CHAT, json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                is_done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"error event: {event['error']}")
            for choice in event["choices"]:
                text.append(choice["delta"].get("content") or "")
                is_finished = is_finished or choice.get("finish_reason") is not None
    if not (is_finished and is_done):
        raise RuntimeError("the stream ended without a finish reason or [DONE]")
    return "".join(text)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def bad_bodies(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body that must be refused with a 4xx."""
    good: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    mutations: list[dict[str, object]] = [
        {"n": 10**9}, {"n": 0}, {"n": -1}, {"temperature": -1}, {"temperature": 10**300}, {"temperature": "hot"},
        {"top_p": 0}, {"top_p": 1.5}, {"top_k": -5}, {"top_k": 10**12}, {"max_tokens": 10**12}, {"max_tokens": 0},
        {"max_tokens": -3}, {"seed": 2**70}, {"logit_bias": {"999999999": 1}}, {"logit_bias": {"x": 1}},
        {"logit_bias": {"5": 1e9}}, {"stop": [""]}, {"stop": ["x"] * 100}, {"stop": ["y" * 10_000]}, {"stop": 5},
        {"presence_penalty": 99}, {"frequency_penalty": -99}, {"repetition_penalty": 0}, {"min_p": 2},
        {"logprobs": "yes"}, {"top_logprobs": 10**6, "logprobs": True}, {"messages": []}, {"messages": "hi"},
        {"messages": [{"role": "wizard", "content": "x"}]}, {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "user"}] * 5000}, {"no_such_field": 1}, {"stream": "maybe"}, {"model": "no-such-model"},
        {"messages": [{"role": "user", "content": "long " * 50_000}]}, {"min_tokens": 10, "max_tokens": 5},
        {"stop_token_ids": [-1]}, {"stop_token_ids": [10**9]}, {"bad_words": [""]}, {"priority": 10**9},
    ]  # fmt: skip
    raw = [
        b"", b"{", b"null", b"[]", b'"text"', b"{'a': 1}", b"\xff\xfe\x00",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"temperature": Infinity, "messages": [{"role": "user", "content": "x"}]}',
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
        (f'{{"messages": {nested(50_000)}}}').encode(), (f'{{"metadata": {nested(500)}}}').encode(),
        b'{"messages": [{"role": "user", "content": "' + b"A" * 10_000_000 + b'"}]}',
    ]  # fmt: skip
    completions: list[dict[str, object]] = [
        {"prompt": ""}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [-1]}, {"prompt": [10**9]}, {"prompt": {"a": 1}},
        {"prompt": ["x"] * 100_000}, {"prompt": "x", "best_of": 10**9}, {"prompt": "x", "n": 10**9},
        {"prompt": "x", "echo": 3},
    ]  # fmt: skip
    kind = rng.random()
    if kind < 0.55:
        return CHAT, json.dumps(good | rng.choice(mutations)).encode()
    if kind < 0.8:
        # The ten-megabyte body is one of many, but it must stay rare for the clock's sake.
        return CHAT, raw[-1] if rng.random() < 0.02 else rng.choice(raw[:-1])
    return COMPLETIONS, json.dumps({"model": MODEL, **rng.choice(completions)}).encode()


class Storm:
    """The disturbed phase: a bounded number of requests at a bounded concurrency."""

    def __init__(self, url: str, session: aiohttp.ClientSession, twins: list[str], report: Report) -> None:
        self.url = url
        self.session = session
        self.twins = twins
        self.report = report
        self.rng = random.Random(7)

    async def healthy(self) -> None:
        index = self.rng.randrange(len(self.twins))
        text = await read_stream(self.session, self.url, healthy_body(index))
        self.report.num_healthy += 1
        self.report.expect(
            text == self.twins[index], f"healthy stream {index} differs: {text!r} != {self.twins[index]!r}"
        )

    async def bad(self) -> None:
        path, body = bad_bodies(self.rng)
        async with self.session.post(self.url + path, data=body) as response:
            answer = await response.read()
            self.report.statuses[str(response.status)] += 1
            self.report.expect(
                400 <= response.status < 500, f"{path} {body[:120]!r} got {response.status} {answer[:200]!r}"
            )
            self.report.expect(b"Traceback" not in answer, f"a stack trace went out for {body[:120]!r}")

    async def vanish(self) -> None:
        """Disconnects before the answer, or after a few chunks of it."""
        body = healthy_body(self.rng.randrange(1000)) | {"max_tokens": 200, "ignore_eos": True}
        num_chunks = self.rng.choice([0, 0, 1, 2, 5, 20])
        timeout = aiohttp.ClientTimeout(total=self.rng.choice([0.001, 0.01, 0.05, 5.0]))
        try:
            async with self.session.post(self.url + CHAT, json=body, timeout=timeout) as response:
                for _ in range(num_chunks):
                    await response.content.readline()
                response.close()
        except (TimeoutError, aiohttp.ClientError):
            pass
        self.report.statuses["vanished"] += 1

    async def half_a_request(self) -> None:
        """Opens a connection, sends part of a request, and leaves."""
        host, port = re.findall(r"//([^:]+):(\d+)", self.url)[0]
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{".encode())
        await asyncio.sleep(self.rng.random() * 0.05)
        writer.close()
        self.report.statuses["half"] += 1

    async def run(self, num_requests: int, concurrency: int) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [self.healthy, self.bad, self.vanish, self.half_a_request]
        plan = self.rng.choices(kinds, weights=[25, 45, 25, 5], k=num_requests)
        pending = iter(plan)

        async def worker() -> None:
            for kind in pending:
                try:
                    await kind()
                except Exception as error:
                    self.report.problems.append(f"{kind.__name__}: {type(error).__name__}: {error}")

        await asyncio.gather(*(worker() for _ in range(concurrency)))


async def metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with session.get(url + "/metrics") as response:
        text = await response.text()
    return {
        match[1]: float(match[2])
        for match in re.finditer(r"^(penstock_\w+)(?:\{[^}]*\})? ([0-9.e+-]+)$", text, re.MULTILINE)
    }


def resident_bytes(root: psutil.Process) -> int:
    return sum(process.memory_info().rss for process in [root, *root.children(recursive=True)])


async def wait_idle(session: aiohttp.ClientSession, url: str, report: Report) -> None:
    """The engine must be empty soon after the last client left, and must have checked its invariants."""
    values: dict[str, float] = {}
    for _ in range(100):
        values = await metrics(session, url)
        if values["penstock_requests_running"] == 0 and values["penstock_requests_waiting"] == 0:
            break
        await asyncio.sleep(0.1)
    report.expect(values["penstock_requests_running"] == 0, "requests still run although every client is gone")
    await asyncio.sleep(2.5)  # an idle engine checks its invariants and reports
    values = await metrics(session, url)
    free, cached, total = (values[f"penstock_kv_cache_{name}"] for name in ("free_blocks", "cached_blocks", "blocks"))
    report.expect(free + cached == total, f"blocks leak: {free:g} free + {cached:g} cached != {total:g}")
    report.expect(values["penstock_invariant_checks_total"] > 0, "no invariant check ran")
    report.expect(values["penstock_invariant_violations_total"] == 0, "an invariant was violated")


async def attack(url: str, root: psutil.Process, num_requests: int, concurrency: int) -> Report:
    report = Report()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        twins = [await read_stream(session, url, healthy_body(index)) for index in range(24)]
        storm = Storm(url, session, twins, report)
        await storm.run(max(100, num_requests // 10), concurrency)  # reaches the level that memory must return to
        engines = sorted(process.pid for process in root.children(recursive=True))
        level_bytes = resident_bytes(root)
        started_s = time.monotonic()
        await storm.run(num_requests, concurrency)
        elapsed_s = time.monotonic() - started_s
        await wait_idle(session, url, report)
        report.expect(
            sorted(process.pid for process in root.children(recursive=True)) == engines, "the engine's process changed"
        )
        growth_bytes = resident_bytes(root) - level_bytes
        report.expect(growth_bytes < RSS_SLACK_BYTES, f"memory grew by {growth_bytes / 2**20:.0f} MiB")
        for index, twin in enumerate(twins):
            text = await read_stream(session, url, healthy_body(index))
            report.expect(text == twin, f"after the storm, healthy stream {index} differs")
    print(
        f"{num_requests} requests in {elapsed_s:.0f} s at concurrency {concurrency}: {report.num_healthy} healthy "
        f"streams, {dict(sorted(report.statuses.items()))}; processes {engines}; memory {growth_bytes / 2**20:+.1f} MiB"
    )
    return report


async def run(arguments: argparse.Namespace) -> int:
    command = [
        sys.executable,
        "-m",
        "penstock.cli.main",
        "serve",
        *([arguments.model] if arguments.model else []),
        "--served-model-name",
        MODEL,
        # A small pool, so that the first part of the storm fills it: what memory grows by later is no cache.
        "--max-num-seqs",
        "16",
        "--max-model-len",
        "512",
        "--log-level",
        "warning",
        "--port",
        str(arguments.port),
    ]
    server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    url = f"http://127.0.0.1:{arguments.port}"
    try:
        await wait_ready(url, server)
        report = await attack(url, psutil.Process(server.pid), arguments.requests, arguments.concurrency)
    finally:
        if server.returncode is None:
            server.terminate()
            await server.wait()
    for problem in report.problems[:20]:
        print("PROBLEM:", problem)
    print("FAILED" if report.problems else "passed", f"({len(report.problems)} problems)")
    return 1 if report.problems else 0


async def wait_ready(url: str, server: asyncio.subprocess.Process) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            if server.returncode is not None:
                raise SystemExit("the server ended before it was ready")
            try:
                async with session.get(url + "/health/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
    raise SystemExit("the server did not become ready")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--model", default="", help="a checkpoint; default: the bundled model")
    parser.add_argument("--port", type=int, default=8731)
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
