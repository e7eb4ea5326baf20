"""Every route under fuzz: no answer of 5xx, the engine lives, and nothing is left behind.

    python tools/fuzz_routes.py [--seconds 600] [--seed 1] [--model DIR]

Starts `penstock serve` and sends, to every route it documents: valid bodies with parts exchanged for something absurd,
with bytes flipped or cut off; plain noise; NaN, huge numbers, deep nesting; wrong methods, content types and query
strings; requests whose connection is cut in the middle of the head, the body or the answer. Between them a healthy
stream has to say what it said before. Afterwards the engine must be the same process, idle, its blocks free or cached,
its invariants kept; and in the second half no process may have grown. (In the first half they do: the KV cache's pages
are touched one by one, and the caches of grammars and of the tokenizer's words fill up.)
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import sys
import tempfile
import time
from typing import Any

import aiohttp
import psutil
from hostile import MODEL, Report, healthy_body, read_stream, wait_idle, wait_ready

MESSAGES = [{"role": "user", "content": "Hello?"}]
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
SAMPLED: dict[str, Any] = {
    "model": MODEL, "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "seed": 1, "stop": ["x"], "n": 1,
    "logit_bias": {"5": 1.0}, "metadata": {"a": "b"}, "dry_multiplier": 0.5, "top_k": 5,
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, "b"]}}, "required": ["a"]}
MAX_GROWTH_MIB = 12.0
SHORTEST_MEASURED_S = 300.0  # of a run whose second half says something about memory
# Bodies that are served; what is not named here gets an empty one.
SEEDS: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {**SAMPLED, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2},
        {**SAMPLED, "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}, "tools": TOOLS},
        {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "tools": TOOLS, "tool_choice": "required"},
        {"model": MODEL, "messages": MESSAGES, "max_tokens": 8,
         "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
    ],
    "/v1/completions": [
        {**SAMPLED, "prompt": "Once", "echo": True, "logprobs": 1},
        {**SAMPLED, "prompt": [[1, 2, 3], [4]], "stream": True},
        {"model": MODEL, "prompt": "x", "max_tokens": 4, "structured_outputs": {"regex": "[ab]{2}"}},
    ],
    "/v1/generate": [{**SAMPLED, "token_ids": [1, 2, 3]}, {**SAMPLED, "prompt": "x", "stream": True}],
    "/v1/render": [{"model": MODEL, "messages": MESSAGES, "tools": TOOLS}],
    "/v1/embeddings": [{"model": MODEL, "input": ["a", "b"], "dimensions": 4, "encoding_format": "base64"}],
    "/score": [{"model": MODEL, "text_1": "a", "text_2": ["b", "c"]}],
    "/classify": [{"model": MODEL, "input": "a"}],
    "/rerank": [{"model": MODEL, "query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}],
    "/v1/responses": [
        {"model": MODEL, "input": "Hello?", "max_output_tokens": 4, "stream": True, "store": False},
        {"model": MODEL, "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
         "max_output_tokens": 4, "tools": [{"type": "function", **FUNCTION}]},
    ],
    "/v1/batches": [{"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"}],
    "/v1/messages": [
        {"model": MODEL, "max_tokens": 4, "messages": MESSAGES, "stream": True,
         "tools": [{"name": "f", "input_schema": FUNCTION["parameters"]}],
         "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "5m"}}]},
        {"model": MODEL, "max_tokens": 1200, "messages": MESSAGES, "stop_sequences": ["e"],
         "thinking": {"type": "enabled", "budget_tokens": 1024},
         "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ],
    "/v1/messages/count_tokens": [{"model": MODEL, "messages": MESSAGES}],
    "/api/chat": [{"model": MODEL, "messages": MESSAGES, "options": {"num_predict": 4, "seed": 1}, "format": SCHEMA}],
    "/api/generate": [{"model": MODEL, "prompt": "a", "stream": False, "options": {"num_predict": 4}}],
    "/api/embed": [{"model": MODEL, "input": ["a"]}],
    "/api/show": [{"model": MODEL}],
    "/generate": [{"inputs": "a", "parameters": {"max_new_tokens": 4, "details": True, "top_n_tokens": 2}}],
    "/generate_stream": [{"inputs": "a", "parameters": {"max_new_tokens": 4, "stop": ["x"], "do_sample": True}}],
    "/": [{"inputs": "a", "stream": True, "parameters": {"max_new_tokens": 4}}],
    "/embed": [{"inputs": ["a", "b"], "normalize": True}],
    "/tokenize": [{"inputs": "a"}, {"model": MODEL, "prompt": "a"}, {"messages": MESSAGES}],
    "/detokenize": [{"tokens": [1, 2]}],
}  # fmt: skip
ALIASES = {"/v1/score": "/score", "/v1/classify": "/classify", "/v1/rerank": "/rerank", "/v2/rerank": "/rerank"}
RAW = (
    b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 5000, b"[" * 3000, b'{"a":' * 200, b'"\\ud800"', b"'a'", b"\xff\xfe",
)  # fmt: skip
ABSURD: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, -(2**64), 10**40, 0.1, 1e308, "", "x", "\x00", "é\ud83d\ude42", "a" * 5000,
    "\n" * 50, [], {}, [[]], [None], {"": {}}, [1] * 300, {str(index): index for index in range(300)},
    "../../etc/passwd", "{{ 7*7 }}", "<|im_start|>", "(a+)+$", {"type": "object", "not": {}}, {"$ref": "#"}, "%s%n",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE")
TYPES = (
    "application/json", "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "é", "",
)  # fmt: skip
QUERIES = (
    "", "?limit=-1", "?limit=99999999999999999999", "?after=%00", "?a=b&a=c", "?order=up", "?" + "q" * 3000, "?%zz",
)  # fmt: skip


def places(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        found.append((value, key))
        places(inner, found)
    return found


def mutated(seed: dict[str, Any], rng: random.Random) -> bytes:
    """A valid body with a few things wrong."""
    body = copy.deepcopy(seed)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        container, key = rng.choice(places(body) or [(body, "x")])
        kind = rng.random()
        if kind < 0.6:
            container[key] = copy.deepcopy(rng.choice(ABSURD))
        elif kind < 0.75 and isinstance(container, dict):
            container.pop(key, None)
        elif kind < 0.85 and isinstance(container, dict):
            container[rng.choice(("nonsense", "", "stream", "a" * 300, "__proto__"))] = copy.deepcopy(
                rng.choice(ABSURD)
            )
        elif isinstance(container, list):
            container.extend(copy.deepcopy(container[:50]) * rng.choice((1, 20)))
        else:
            container[key] = "@RAW@"
    data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    data = data.replace(b'"@RAW@"', rng.choice(RAW))
    kind = rng.random()
    if kind < 0.1:
        data = data[: rng.randrange(len(data) + 1)]
    elif kind < 0.25:
        changed = bytearray(data or b"x")
        for _ in range(rng.choice((1, 1, 4, 30))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        data = bytes(changed)
    elif kind < 0.3:
        data = rng.randbytes(rng.choice((1, 30, 3000)))
    return data


class Fuzzer:
    """Sends until the time is over. Problems are answers of 5xx, stack traces, and answers that never end."""

    def __init__(self, url: str, session: aiohttp.ClientSession, routes: list[tuple[str, str]], seed: int) -> None:
        self.url = url
        self.session = session
        self.routes = routes
        self.rng = random.Random(seed)
        self.report = Report()
        self.num_sent = 0

    async def run(self, seconds: float, concurrency: int) -> None:
        end_s = time.monotonic() + seconds

        async def worker() -> None:
            while time.monotonic() < end_s:
                self.num_sent += 1
                method, path = self._route()
                body = self._body(path)
                try:
                    async with asyncio.timeout(60):
                        if self.rng.random() < 0.2:
                            await self._cut(method, path, body)
                        else:
                            await self._send(method, path, body)
                except (aiohttp.ClientError, ConnectionError, ValueError):
                    self.report.statuses["connection"] += 1  # what is no HTTP is answered by closing it
                except TimeoutError:
                    self.report.problems.append(f"{method} {path} did not answer: {body[:300]!r}")

        await asyncio.gather(*(worker() for _ in range(concurrency)))

    def _route(self) -> tuple[str, str]:
        method, path = self.rng.choice(self.routes)
        if self.rng.random() < 0.05:
            method = self.rng.choice(METHODS)
        for name in ("response_id", "file_id", "batch_id", "name"):
            some_id = self.rng.choice(("x", "resp_1", "file-0", "%00", "..%2f..", "a" * 2000, "é"))
            path = path.replace("{" + name + "}", some_id)
        return method, path + self.rng.choice(QUERIES) * (self.rng.random() < 0.1)

    def _body(self, path: str) -> bytes:
        bare = path.split("?", maxsplit=1)[0]
        seeds = SEEDS.get(ALIASES.get(bare, bare), [{}])
        return mutated(self.rng.choice(seeds), self.rng)

    async def _send(self, method: str, path: str, body: bytes) -> None:
        if method in ("GET", "HEAD") and self.rng.random() < 0.9:
            body = b""
        kind = self.rng.choice(TYPES) if self.rng.random() < 0.1 else TYPES[0]
        headers = {"content-type": kind} if kind else {}
        if self.rng.random() < 0.03:
            headers["x-request-timeout"] = self.rng.choice(("0", "nan", "1", "-1", "0.001", "x"))
        async with self.session.request(method, self.url + path, data=body, headers=headers) as response:
            answer = await response.read()
            self.report.statuses[str(response.status)] += 1
            # 504: the deadline that the request set; 501 and below 500 are refusals.
            is_fine = response.status < 500 or (response.status == 504 and "x-request-timeout" in headers)
            shown = f"{method} {path} {body[:300]!r}"
            self.report.expect(is_fine, f"{shown} got {response.status} {answer[:300]!r}")
            self.report.expect(b"Traceback" not in answer, f"a stack trace went out for {shown}")

    async def _cut(self, method: str, path: str, body: bytes) -> None:
        """A connection that is cut in the head, in the body, or in the answer."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        length = len(body) + self.rng.choice((0, 0, 5, -1))
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n"
        data = head.encode("latin-1", "replace") + body
        if self.rng.random() < 0.1:
            data = self.rng.randbytes(200)
        writer.write(data[: self.rng.choice((len(data), len(data), self.rng.randrange(len(data) + 1)))])
        try:
            await writer.drain()
            if self.rng.random() < 0.6:
                async with asyncio.timeout(self.rng.choice((0.001, 0.02, 0.2))):
                    await reader.read(self.rng.choice((1, 200, 5000)))
        except (TimeoutError, ConnectionError):
            pass
        writer.close()
        self.report.statuses["cut"] += 1


async def documented_routes(session: aiohttp.ClientSession, url: str) -> list[tuple[str, str]]:
    async with session.get(url + "/openapi.json") as response:
        document = await response.json()
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


async def fuzz(url: str, seconds: float, seed: int, concurrency: int = 12) -> Fuzzer:
    """Fuzzes a server that is ready."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        fuzzer = Fuzzer(url, session, await documented_routes(session, url), seed)
        await fuzzer.run(seconds, concurrency)
    return fuzzer


def resident_mib(root: psutil.Process) -> dict[str, float]:
    """Of the processes that stay: the worker forks a short-lived one for every new grammar."""
    processes = {"server": root}
    for name in ("engine", "worker"):
        parent = list(processes.values())[-1]
        children = sorted(parent.children(), key=lambda process: process.pid)
        if children:
            processes[name] = children[0]
    return {name: process.memory_info().rss / 2**20 for name, process in processes.items()}


def growth_problems(levels: list[dict[str, float]]) -> list[str]:
    """levels: of every piece of a run, in turn."""
    half, last = levels[len(levels) // 2], levels[-1]
    return [
        f"memory of the {name} grew by {last[name] - half[name]:.1f} MiB in the second half"
        for name in last
        if last[name] - half.get(name, 0.0) > MAX_GROWTH_MIB
    ]


async def attack(url: str, root: psutil.Process, seconds: float, seed: int) -> list[str]:
    problems: list[str] = []
    async with aiohttp.ClientSession() as session:
        twin = await read_stream(session, url, healthy_body(0))
        engine = root.children()[0].pid
        levels = [resident_mib(root)]
        num_sent, statuses = 0, dict[str, int]()
        pieces = max(1, round(seconds / 20))
        for piece in range(pieces):
            fuzzer = await fuzz(url, seconds / pieces, seed + piece)
            num_sent += fuzzer.num_sent
            problems += fuzzer.report.problems
            for status, count in fuzzer.report.statuses.items():
                statuses[status] = statuses.get(status, 0) + count
            if await read_stream(session, url, healthy_body(0)) != twin:
                problems.append("a healthy stream differs")
            levels.append(resident_mib(root))
        report = Report()
        await wait_idle(session, url, report)
        problems += report.problems
        if [process.pid for process in root.children()] != [engine]:
            problems.append(f"the engine's process changed: {engine} {root.children()}")
    print(f"{num_sent} requests in {seconds:.0f} s: {dict(sorted(statuses.items()))}")
    for name in levels[-1]:
        shown = ", ".join(f"{levels[len(levels) * part // 8].get(name, 0.0):.1f}" for part in range(8))
        print(f"memory of the {name}, MiB: {shown}, {levels[-1][name]:.1f}")
    if seconds >= SHORTEST_MEASURED_S:
        problems += growth_problems(levels)
    return problems


async def run(arguments: argparse.Namespace, data_directory: str) -> int:
    command = [
        sys.executable, "-m", "penstock.cli.main", "serve", *([arguments.model] if arguments.model else []),
        "--served-model-name", MODEL, "--max-num-seqs", "16", "--max-model-len", "2048", "--num-threads", "1",
        "--max-memory", "1GiB", "--request-timeout", "30", "--log-level", "error", "--port", str(arguments.port),
        "--data-directory", data_directory,
    ]  # fmt: skip
    server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    url = f"http://127.0.0.1:{arguments.port}"
    try:
        await wait_ready(url, server)
        problems = await attack(url, psutil.Process(server.pid), arguments.seconds, arguments.seed)
        if server.returncode is not None:
            problems.append(f"the server ended with {server.returncode}")
    finally:
        if server.returncode is None:
            server.terminate()
            await server.wait()
    for problem in problems[:20]:
        print("PROBLEM:", problem)
    print("FAILED" if problems else "passed", f"({len(problems)} problems)")
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="", help="a checkpoint; default: the bundled model")
    parser.add_argument("--port", type=int, default=8431)
    with tempfile.TemporaryDirectory() as data_directory:
        return asyncio.run(run(parser.parse_args(), data_directory))


if __name__ == "__main__":
    sys.exit(main())
