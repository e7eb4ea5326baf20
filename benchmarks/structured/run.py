"""Structured output: what it must show, with figures.

python benchmarks/structured/run.py corpus   [--count 2000] [--model DIR] [--rows 32] [--seed 100]  all outputs validate
python benchmarks/structured/run.py overhead [--model DIR] [--steps 24]     decode with and without, in turn
python benchmarks/structured/run.py jumps    [--model DIR]                  forced text drawn, and given out at once
python benchmarks/structured/run.py cold                                    first token of new 200-key schemas
python benchmarks/structured/run.py hostile  [--count 500] [--seed 11]      healthy streams beside hostile grammars
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1]))
from structured.corpus import cases
from structured.hostile import hostile_specs

from penstock import LLM, GrammarSpec, SamplingParams
from penstock.engine.core import EngineCore
from penstock.messages import EngineRequest, GrammarKind

TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)
NUM_STREAMS = 16
QUIET_WINDOW_S = 5.0
# The process that tries grammars out is there a second after the server; the first grammar waits for it.
START_S = 2.0
HOSTILE_IN_WINDOW = 50


# ---- corpus


def corpus(count: int, model: str, rows: int, seed: int) -> None:
    """rows: few of them take short jumps over forced text too."""
    chosen = list(itertools.islice(cases(seed), count))
    sampling = [
        SamplingParams(temperature=TEMPERATURES[i % 5], seed=i, max_tokens=200, grammar=case.spec)
        for i, case in enumerate(chosen)
    ]
    started = time.monotonic()
    with LLM(model, max_num_seqs=rows) as llm:
        generations = llm.generate(["Give me one:"] * count, sampling)
        num_steps = llm._core.stats().num_steps
    counts: Counter[tuple[str, str]] = Counter()
    invalid = []
    for case, generation in zip(chosen, generations, strict=True):
        completion = generation.outputs[0]
        counts[case.kind, str(completion.finish_reason)] += 1
        if completion.finish_reason == "stop" and not case.is_valid(completion.text):
            invalid.append((case.spec, completion.text))
        if completion.finish_reason == "error":
            print("refused:", completion.error.message if completion.error else "", case.spec.text[:100])
    for (kind, reason), number in sorted(counts.items()):
        print(f"{kind:12s} {reason:7s} {number}")
    num_tokens = sum(len(generation.outputs[0].token_ids) for generation in generations)
    print(f"{num_tokens} tokens in {num_steps} steps of {rows} rows and {time.monotonic() - started:.1f} s")
    print(f"{count} cases; finished but not valid: {len(invalid)}")
    for spec, text in invalid[:5]:
        print(spec, repr(text))


# ---- overhead


def overhead(model: str, rounds: int = 4, steps: int = 24, rows: int = 32) -> None:
    """Decoding without a grammar, with one token by token, and with forced tokens given out at once, in turn."""
    schema = {
        "type": "object", "additionalProperties": False,
        "properties": {f"field_{i}": {"type": ["string", "integer", "boolean"][i % 3]} for i in range(200)},
        "required": [f"field_{i}" for i in range(200)],
    }  # fmt: skip
    grammars = {"200 keys": GrammarSpec.json_schema(schema), "any object": GrammarSpec.json_object()}
    with LLM(model, max_num_seqs=rows, max_model_len=1024) as llm:
        core: EngineCore = llm._core
        core.set_vocabulary(llm._processor.tokenizer.vocabulary().of_size(llm.ready.vocab_size))
        masks = core.executor.runner._batch.masks  # type: ignore[attr-defined]
        for name, grammar in grammars.items():
            modes = (("free", None, False), ("drawn", grammar, False), ("jumps", grammar, True))
            taken: dict[str, list[tuple[float, float]]] = {mode: [] for mode, _, _ in modes}
            for _, (mode, one, masks.jumps) in itertools.product(range(rounds + 1), modes):
                taken[mode].append(_decode(core, one, rows, steps))
            for mode, pairs in taken.items():
                step_ms, tokens = (statistics.median(values) for values in zip(*pairs[1:], strict=True))
                print(f"{name}, {mode}: {step_ms:.2f} ms a step, {tokens:.0f} tokens a second")
            for mode in ("drawn", "jumps"):
                for what, index in (("time a step", 0), ("tokens a second", 1)):
                    ratios = [one[index] / free[index] for free, one in zip(taken["free"], taken[mode], strict=True)]
                    change = (statistics.median(ratios[1:]) - 1) * 100
                    print(f"{name}, {mode}: {what} {change:+.2f} % (pairs: {_shown(ratios[1:])})")


# ---- jumps

LONG_NAMES = (
    "delivery address line",
    "preferred time of day",
    "is this a business address",
    "number of parcels",
    "country of destination",
    "currency of the declared value",
    "insurance is wanted",
    "kind of service",
    "leave with a neighbour",
    "weight class of the heaviest parcel",
    "language of the notice",
    "priority",
)
KINDS: tuple[dict[str, Any], ...] = (
    {"enum": ["standard", "express", "overnight"]}, {"type": "boolean"},
    {"type": "integer", "minimum": 0, "maximum": 99},
)  # fmt: skip


def jumps(model: str, rounds: int = 3) -> None:
    """Whole documents with much forced text: forced tokens drawn one by one, and given out at once, in turn."""
    properties = {name: KINDS[index % 3] for index, name in enumerate(LONG_NAMES)}
    schema = {"type": "object", "additionalProperties": False, "required": list(properties), "properties": properties}
    grammar = GrammarSpec.json_schema(schema)
    with LLM(model, max_num_seqs=32, max_model_len=1024) as llm:
        core: EngineCore = llm._core
        for rows in (1, 8, 32):
            sampling = [
                SamplingParams(temperature=0.8, seed=row, max_tokens=600, grammar=grammar) for row in range(rows)
            ]
            taken: dict[bool, list[float]] = {False: [], True: []}
            steps, texts = {}, {}
            for _, jumps in itertools.product(range(rounds + 1), (False, True)):
                core.executor.runner._batch.masks.jumps = jumps  # type: ignore[attr-defined]
                first, started = core.stats().num_steps, time.perf_counter()
                generations = llm.generate(["An order:"] * rows, sampling)
                taken[jumps].append(time.perf_counter() - started)
                steps[jumps] = core.stats().num_steps - first
                texts[jumps] = [one.outputs[0].token_ids for one in generations]
            assert texts[False] == texts[True]
            drawn, jumped = (statistics.median(taken[jumps][1:]) for jumps in (False, True))
            num_tokens = sum(map(len, texts[True]))
            print(
                f"{rows} rows, {num_tokens} tokens: {steps[False]} steps in {drawn:.3f} s drawn, {steps[True]} in "
                f"{jumped:.3f} s with jumps: {drawn / jumped:.2f} times as fast"
            )


def _shown(ratios: list[float]) -> str:
    return ", ".join(f"{ratio:.3f}" for ratio in ratios)


def _decode(core: EngineCore, grammar: GrammarSpec | None, rows: int, steps: int) -> tuple[float, float]:
    """(milliseconds a step, tokens a second) of `steps` decoding steps of all rows."""
    ids = [f"{time.monotonic_ns()}-{row}" for row in range(rows)]
    for row, request_id in enumerate(ids):
        sampling = SamplingParams(temperature=0.8, seed=row, max_tokens=900, grammar=grammar)
        core.add(EngineRequest(request_id=request_id, prompt_token_ids=[5, 6, 7, 8], sampling=sampling, max_tokens=900))
    started: set[str] = set()
    while len(started) < rows:
        started |= {output.request_id for output in core.step() if output.token_ids}
    core.step()
    begin = time.perf_counter()
    num_tokens = 0
    for _ in range(steps):
        outputs = core.step()
        assert not any(output.finish_reason for output in outputs), outputs
        num_tokens += sum(len(output.token_ids) for output in outputs)
    elapsed = time.perf_counter() - begin
    core.abort(ids)
    while core.has_work():
        core.step()
    return elapsed / steps * 1e3, num_tokens / elapsed


# ---- a server and its clients


@contextlib.contextmanager
def server(port: int) -> Any:
    command = [sys.executable, "-m", "penstock.cli.main", "serve", "--port", str(port), "--log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = next(match[1] for line in process.stdout if (match := re.search(r"is served at (\S+)", line)))
    try:
        yield url
    finally:
        process.terminate()
        process.wait()


def _body(spec: GrammarSpec | None, **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "penstock-demo", "messages": [{"role": "user", "content": "Hello"}], **more}
    if spec is not None:
        name = "json" if spec.kind is GrammarKind.JSON_SCHEMA else spec.kind.value
        body["structured_outputs"] = {name: json.loads(spec.text) if name == "choice" else spec.text}
    return body


async def _tokens(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> AsyncIterator[float]:
    """Times at which pieces of an answer's text arrived."""
    async with http.post(f"{url}/chat/completions", json={**body, "stream": True}) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if b'"content":"' in line and b'"content":""' not in line:
                yield time.perf_counter()


async def cold(url: str) -> None:
    await asyncio.sleep(START_S)
    async with aiohttp.ClientSession() as http:
        for name, keys in (("free", 0), ("200 keys, new", 200)):
            taken = []
            for trial in range(24):
                properties = {f"key_{trial}_{i}": {"type": ["string", "integer"][i % 2]} for i in range(keys)}
                schema = {"type": "object", "properties": properties, "required": list(properties)}
                spec = GrammarSpec.json_schema(schema) if keys else None
                started = time.perf_counter()
                async with contextlib.aclosing(_tokens(http, url, _body(spec, max_tokens=20))) as times:
                    taken.append(await anext(times) - started)
            shown = ", ".join(f"{one * 1e3:.0f}" for one in taken)
            print(f"{name}: first token after {statistics.median(taken) * 1e3:.1f} ms (in turn: {shown})")


async def hostile(url: str, count: int, seed: int) -> None:
    """Windows with hostile requests, one after another, and windows without, in turn."""
    # Made beforehand: their making is no cost of the server.
    bodies = iter([json.dumps(_body(spec, max_tokens=16)) for spec in itertools.islice(hostile_specs(seed), count)])
    ticks: list[list[float]] = [[] for _ in range(NUM_STREAMS)]
    statuses: Counter[int] = Counter()
    took: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        healthy = [asyncio.create_task(_stream_forever(http, url, index, ticks[index])) for index in range(NUM_STREAMS)]
        await asyncio.sleep(2)
        quiet, attacked = [], []
        while len(took) < count:
            quiet.append(await _rate(ticks, lambda: asyncio.sleep(QUIET_WINDOW_S)))
            window = itertools.islice(bodies, HOSTILE_IN_WINDOW)
            attacked.append(await _rate(ticks, functools.partial(_attack, http, url, window, statuses, took)))
        quiet.append(await _rate(ticks, lambda: asyncio.sleep(QUIET_WINDOW_S)))
        for task in healthy:
            task.cancel()
    print(f"hostile: {sum(statuses.values())} requests, statuses {dict(statuses)}, slowest {max(took):.2f} s")
    print(f"healthy tokens/s: quiet {[round(rate) for rate in quiet]}, attacked {[round(rate) for rate in attacked]}")
    beside = [2 * rate / (before + after) for rate, before, after in zip(attacked, quiet, quiet[1:], strict=False)]
    print(f"pace beside them: {statistics.median(beside):.3f} of the pace around (windows: {_shown(beside)})")


async def _stream_forever(http: aiohttp.ClientSession, url: str, index: int, ticks: list[float]) -> None:
    # Of different lengths, so that they do not all begin anew at once.
    body = _body(None, max_tokens=400 + 25 * index, ignore_eos=True, seed=index)
    while True:
        async for now in _tokens(http, url, body):
            ticks.append(now)  # noqa: PERF401 - the list is read while it grows


async def _rate(ticks: list[list[float]], run: Callable[[], Any]) -> float:
    """Tokens a second of all healthy streams while something runs."""
    before, started = sum(map(len, ticks)), time.perf_counter()
    await run()
    return (sum(map(len, ticks)) - before) / (time.perf_counter() - started)


async def _attack(
    http: aiohttp.ClientSession, url: str, bodies: Iterable[str], statuses: Counter[int], took: list[float]
) -> None:
    headers = {"content-type": "application/json"}
    for body in bodies:
        started = time.perf_counter()
        async with http.post(f"{url}/chat/completions", data=body, headers=headers) as answer:
            await answer.read()
            statuses[answer.status] += 1
        took.append(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["corpus", "overhead", "jumps", "cold", "hostile"])
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--model", default="")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8210)
    options = parser.parse_args()
    if options.what == "corpus":
        corpus(options.count or 2000, options.model, options.rows, options.seed or 100)
    elif options.what == "overhead":
        overhead(options.model, options.rounds, options.steps)
    elif options.what == "jumps":
        jumps(options.model)
    else:
        with server(options.port) as url:
            asyncio.run(cold(url) if options.what == "cold" else hostile(url, options.count or 500, options.seed or 11))


if __name__ == "__main__":
    main()
