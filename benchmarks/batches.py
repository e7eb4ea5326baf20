"""What a batch survives, and what it costs everybody else.

    python benchmarks/batches.py --requests 5000

Starts a server with the bundled model, measures the time to first token of interactive requests without and with a
batch in progress, kills the server with SIGKILL in the middle of the batch, starts it again, and counts the results.
Interactive requests arrive by a Poisson process, whatever became of those before. Every tenth line of the batch has a
long prompt and a long answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Any

import aiohttp
import openai

MODEL = "penstock-demo"
PATH = "/v1/chat/completions"


def start(data: str, max_num_seqs: int) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "penstock.cli.main", "serve", "--port", "0", "--max-memory", "512MiB"]
    command += ["--num-threads", "1", "--data-directory", data, "--max-num-seqs", str(max_num_seqs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"is served at (\S+)/v1", line):
            return process, match[1]
    raise SystemExit("the server did not start")


async def first_token_s(http: aiohttp.ClientSession, url: str, number: int) -> float:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Count from {number} to {number + 5}."}],
        "max_tokens": 8,
        "stream": True,
    }
    begun_s = time.perf_counter()
    async with http.post(f"{url}{PATH}", json=body) as answer:
        await answer.content.readline()
        taken_s = time.perf_counter() - begun_s
        await answer.read()
    return taken_s


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


async def sample(url: str, count: int, rate: float) -> list[float]:
    chance = random.Random(1)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        await first_token_s(http, url, 0)
        tasks: list[asyncio.Task[float]] = []
        next_s = time.perf_counter()
        for number in range(count):
            next_s += chance.expovariate(rate)
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
            tasks.append(asyncio.create_task(first_token_s(http, url, number)))
        return await asyncio.gather(*tasks)


def lines(count: int) -> bytes:
    def line(number: int) -> dict[str, Any]:
        is_long = number % 10 == 0
        text = f"Count from {number} to {number + 5}." + " And then once more." * (60 if is_long else 0)
        messages = [{"role": "user", "content": text}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 200 if is_long else 16}
        return {"custom_id": f"c{number}", "method": "POST", "url": PATH, "body": body}

    return "\n".join(json.dumps(line(number)) for number in range(count)).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--rate", type=float, default=8.0, help="interactive requests a second")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as data:
        process, url = start(data, options.max_num_seqs)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        alone = asyncio.run(sample(url, options.samples, options.rate))
        file = client.files.create(file=("lines.jsonl", lines(options.requests)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=PATH, completion_window="24h")
        while done_of(client, batch.id) < options.requests // 20:
            time.sleep(0.1)
        beside = asyncio.run(sample(url, options.samples, options.rate))
        print(f"interactive TTFT p95: {p95(alone) * 1e3:.1f} ms alone, {p95(beside) * 1e3:.1f} ms beside the batch, "
              f"ratio {p95(beside) / p95(alone):.2f}")  # fmt: skip
        while done_of(client, batch.id) < options.requests // 2:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process, url = start(data, options.max_num_seqs)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        print(f"killed; after the restart {done_of(client, batch.id)} results were there")
        while (state := client.batches.retrieve(batch.id)).status != "completed":
            assert state.status == "in_progress", state
            time.sleep(0.2)
        assert state.output_file_id is not None
        content = client.files.content(state.output_file_id).text
        counts = Counter(json.loads(line)["custom_id"] for line in content.splitlines())
        print(f"results: {counts.total()} for {len(counts)} of {options.requests} requests")
        process.terminate()
        process.wait()


def done_of(client: openai.OpenAI, batch_id: str) -> int:
    counts = client.batches.retrieve(batch_id).request_counts
    return counts.completed if counts is not None else 0


if __name__ == "__main__":
    main()
