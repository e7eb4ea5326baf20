#!/usr/bin/env python3
"""Records a working day before Penstock and replays it against Penstock and its peers, one server at a time.

    replay.py --model SMALL_DIR [--requests 150] [--speed 3600] [--keep DIR]

1. benchmarks/day_trace.py makes 24 hours: bursty, multi-turn, three tenants. Sent to `penstock serve --record`.
2. The recording, which holds no contents, is replayed in real time against fresh servers: as token ids against Penstock
   and vLLM, as chat messages of words against Penstock and llama-cpp-python's server, which takes no token ids.

Every server has the first core and one thread, the client the last core: a server that takes all cores leaves a client
none, and its run is void. --keep: where the recording and the replays lie; what lies there is not measured again, so
that they can be taken one at a time, whenever the machine is quiet (--only).

Writes replay.json, replay.md and the report replay.html, which is not kept in git, to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from engines import HERE, WORK, Engine, chosen
from offline import note
from process_tree import end_on_sigterm
from report import RESULTS, Table, machine_facts, write_results

from penstock.bench.environment import manifest
from penstock.bench.metrics import summarise
from penstock.bench.report import Report, ReportedRun
from penstock.bench.results import read_requests
from penstock.bench.traces import read_own, recorded_hit_share
from server import Server, command_of, free_port, served_copy

PENSTOCK = Path(sys.executable).with_name("penstock")
DAY_SCRIPT = HERE.parent / "day_trace.py"
RECORDED = "penstock, while recorded"
REPLAYS = (("penstock", False), ("penstock", True), ("llamacpp", True), ("vllm", False))


@dataclass
class Replayed:
    """One server's replay."""

    name: str
    result: dict[str, Any]
    requests: Path


def server_command(engine: Engine, model: Path, port: int, threads: int) -> list[str]:
    """As in server.py; llama.cpp's server with its cache of prompts on and a context as long as the others'."""
    if engine.name == "vllm":  # tells how much of a prompt it found cached
        return [*command_of(engine, model, port, threads, has_prefix_cache=True), "--enable-prompt-tokens-details"]
    if engine.name == "penstock":
        return command_of(engine, model, port, threads, has_prefix_cache=True)
    command = "import sys, llama_gguf; print(llama_gguf.converted(sys.argv[1], sys.argv[2]))"
    done = subprocess.run(
        [str(engine.python), "-c", command, str(model), str(WORK)],
        capture_output=True, text=True, check=True, cwd=HERE / "workers",
    )  # fmt: skip
    path = done.stdout.strip().splitlines()[-1]
    program = [str(engine.python), "-m", "llama_cpp.server", "--model", path, "--host", "127.0.0.1"]
    program += ["--port", str(port), "--n_ctx", "2048", "--n_threads", str(threads), "--verbose", "False"]
    return [*program, "--interrupt_requests", "False", "--cache", "True"]


def with_least_lengths(trace: Path) -> Path:
    """The trace for a server that knows no `ignore_eos`: it is asked for at least as many tokens as at most."""
    header, records = read_own(trace)
    path = trace.with_name("least-lengths.jsonl")
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        file.write(encoder.encode(header) + b"\n")
        for record in records:
            record.parameters = {**record.parameters, "min_tokens": record.output_length}
            file.write(encoder.encode(record) + b"\n")
    return path


class Replay:
    """One run of the script. Everything but the results lies in `directory`."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options = options
        self.directory = directory
        self.model = served_copy(options.model)
        self.tokens = min(2000, json.loads((self.model / "config.json").read_text())["vocab_size"])
        cores = sorted(os.sched_getaffinity(0))
        self._server_cores = ",".join(map(str, cores[: options.threads]))
        self._client_core = str(cores[-1])

    def record(self, engine: Engine) -> tuple[Path, Replayed]:
        """The trace of the day as a Penstock server saw it, and what its client saw."""
        day = self.directory / "day.jsonl"
        subprocess.run(
            [sys.executable, str(DAY_SCRIPT), str(day), "--requests", str(self.options.requests)], check=True
        )
        more = ["--speed", str(self.options.speed)]
        found = self.against(engine, day, RECORDED, more, ["--record", str(self.directory)])
        return next(self.directory.glob("traffic-*.jsonl")), found

    def against(
        self, engine: Engine, trace: Path, name: str, more: Sequence[str], serve: Sequence[str] = ()
    ) -> Replayed:
        """What lies there of it; else measured, against a fresh server."""
        found = self.directory / f"{name.replace(', ', '-').replace(' ', '-')}"
        if not Path(f"{found}.json").exists():
            note(f"measuring {name}")
            self._measure(engine, trace, name, found, more, serve)
        return Replayed(name, json.loads(Path(f"{found}.json").read_text()), Path(f"{found}.jsonl"))

    def _measure(
        self, engine: Engine, trace: Path, name: str, found: Path, more: Sequence[str], serve: Sequence[str]
    ) -> None:
        port = free_port()
        command = ["taskset", "-c", self._server_cores, *server_command(engine, self.model, port, self.options.threads)]
        server = Server(name, [*command, *serve], engine.environment(), port, takes_token_ids=engine.name != "llamacpp")
        call = ["taskset", "-c", self._client_core, str(PENSTOCK), "bench", "replay", str(trace), server.url, *more]
        call += ["--token-limit", str(self.tokens), "--warmup", "0", "--quiet"]
        call += ["--json", f"{found}.json", "--requests-out", f"{found}.jsonl"]
        try:
            server.wait_until_ready()
            done = subprocess.run(call, capture_output=True, text=True, timeout=3600)
        finally:
            server.tree.end()
        if not Path(f"{found}.json").exists():
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")


def hit_share(result: dict[str, Any]) -> float | None:
    """Cached over prompt tokens; None where the server does not tell."""
    summary = result["summary"]
    if summary["cached_tokens"] is None or not summary["prompt_tokens"]:
        return None
    return float(summary["cached_tokens"] / summary["prompt_tokens"])


def table_of(rows: list[tuple[str, dict[str, Any]]], recorded_share: float | None) -> Table:
    heads = ("server", "succeeded", "TTFT p50 / p99 ms", "ITL p50 / p99 ms", "E2E p99 ms", "output tokens/s", "cached")
    table = Table("One recorded day, replayed", heads)
    for name, result in rows:
        summary = result["summary"]
        latency, share = summary["latency"], hit_share(result)
        pairs = [f"{_ms(latency[metric]['p50'])} / {_ms(latency[metric]['p99'])}" for metric in ("ttft", "itl")]
        done = f"{summary['num_succeeded']} of {summary['num_attempted']}" + (" VOID" if summary["void"] else "")
        cached = "not told" if share is None else f"{share:.1%}"
        table.rows.append(
            (name, done, *pairs, _ms(latency["e2e"]["p99"]), f"{summary['output_token_rate']:.1f}", cached)
        )
    if recorded_share is not None:
        table.note = (
            f"When it was recorded, {recorded_share:.1%} of the prompt tokens were cached; contents were not kept. The "
            "recording also has the two requests by which the harness saw that the server was ready."
        )
    for name, result in rows:
        table.note += "".join(
            f"\n\n{name}: {line}." for line in result["summary"]["warnings"] + result["summary"]["void"]
        )
    return table


def _ms(quantile: dict[str, Any]) -> str:
    value = quantile["ms"]
    return "inf" if value is None or isinstance(value, str) else f"{value:.1f}"


def write_page(replayed: list[Replayed], title: str) -> None:
    """One report of all replays."""
    runs = []
    for one in replayed:
        record = read_requests(one.requests)
        record.server_samples = [(moment_s, values) for moment_s, values in one.result["server_samples"]]
        runs.append(ReportedRun(one.name, record, summarise(record, ())))
    (RESULTS / "replay.html").write_text(Report(title, runs, manifest()).html(), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory, Llama in bf16")
    parser.add_argument("--engines", default="penstock,vllm,llamacpp", help="the first one always takes part")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--speed", type=float, default=3600.0, help="of the recorded day [3600: 24 seconds]")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="of each server")
    parser.add_argument("--keep", type=Path, help="directory of the recording and the replays")
    parser.add_argument("--only", type=int, default=len(REPLAYS), help="stop after so many replays [all]")
    options = parser.parse_args()
    end_on_sigterm()
    engines = {engine.name: engine for engine in chosen(options.engines, options.threads)}
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.keep or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        run = Replay(options, directory)
        trace, seen = run.record(engines["penstock"])
        share = recorded_hit_share(trace)
        replayed = []
        for name, as_chat in REPLAYS[: options.only]:
            if name in engines:
                wanted = with_least_lengths(trace) if name == "llamacpp" else trace
                title = f"{name}, {'chat messages' if as_chat else 'token ids'}"
                replayed.append(run.against(engines[name], wanted, title, ["--chat"] if as_chat else []))
        rows = [(one.name, one.result) for one in (seen, *replayed)]
        table = table_of(rows, share)
        result = {
            "kind": "recorded and replayed day", **machine_facts(options.model, options.threads), "rounds": 1,
            "requests": options.requests, "speed": options.speed, "recorded_hit_share": share,
            "replays": [
                {"name": name, "hit_share": hit_share(found), "summary": found["summary"]} for name, found in rows
            ],
        }  # fmt: skip
        write_results("replay", result, [table])
        write_page(replayed, f"A recorded day against {len(replayed)} servers")
    print(table.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
