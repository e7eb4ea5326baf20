#!/usr/bin/env python3
"""Penstock beside other engines, offline: the same random prompts, the same number of tokens, in one run.

    offline.py --model DIR [--engines penstock,vllm,openvino,transformers,llamacpp] [--threads 2] [--rounds 3]

Every engine is a worker process that stays loaded; the cases go round robin, and workers that are not on the clock are
stopped. What does not fit into memory together runs in groups, the first engine in each of them. Writes JSON and a
markdown table to benchmarks/results/ and prints the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from cases import CASES, SHORT_CASES, Case, Sample, figures
from engines import HERE, WORK, Engine, chosen
from process_tree import end_on_sigterm, wait_for_quiet
from report import Table, machine_facts, offline_tables, write_results
from worker import Worker, WorkerError

LIMITS_SCRIPT = HERE / "machine_limits.py"


@dataclass
class EngineRecord:
    """What one engine showed in one group. memory in bytes; failure is empty when all went well."""

    group: int
    name: str
    version: str = ""
    load_s: float = 0.0
    memory_total: int = 0
    memory_private: int = 0
    failure: str = ""
    samples: dict[str, list[Sample]] = field(default_factory=dict)


def split_into_groups(
    engines: list[Engine], weight_bytes: int, available: int, buffer_bytes: int
) -> list[list[Engine]]:
    """Groups that fit into `available` bytes, the first engine in each; one peer a group at least, fits or not."""
    if len(engines) < 2:
        return [engines]
    first, *peers = engines
    room = available - buffer_bytes - first.memory_bytes(weight_bytes)
    groups: list[list[Engine]] = []
    left = 0
    for peer in peers:
        need = peer.memory_bytes(weight_bytes)
        if not groups or need > left:
            groups.append([first])
            left = room
        groups[-1].append(peer)
        left -= need
    return groups


def token_limit(model: Path) -> int:
    """Ids below this are in both the model's vocabulary and the tokenizer's."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    return int(min(vocabulary, len(tokenizer["model"]["vocab"])))


def weight_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


class Comparison:
    """One run: its options, and everything measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cases: tuple[Case, ...] = SHORT_CASES if options.short else CASES
        if options.cases:
            self.cases = tuple(case for case in self.cases if case.name in options.cases.split(","))
        self.records: list[EngineRecord] = []
        self.limits: list[dict[str, Any]] = []
        self.busy: list[float] = []
        self.seed = int(time.time())

    def run_group(self, index: int, engines: list[Engine]) -> None:
        """Loads the group's engines one after another, runs the warm-up and the rounds, and ends them."""
        workers: dict[str, Worker] = {}
        records = {engine.name: EngineRecord(index, engine.name) for engine in engines}
        self.records += records.values()
        try:
            for engine in engines:
                self._load(engine, workers, records[engine.name])
            for round_index in range(-1, self.options.rounds):
                if round_index >= 0:
                    self.busy.append(wait_for_quiet(0.15, self.options.patience))
                    self.measure_limits()
                for case in self.cases:
                    self._run_case(case, round_index, workers, records)
        finally:
            for worker in workers.values():
                worker.end()
            for name, worker in workers.items():
                records[name].memory_total = worker.memory.peak.total
                records[name].memory_private = worker.memory.peak.private

    def _load(self, engine: Engine, workers: dict[str, Worker], record: EngineRecord) -> None:
        note(f"loading {engine.name}")
        workers[engine.name] = Worker(engine, WORK / "logs" / f"offline-{engine.name}.log")
        request = {
            "model": str(self.options.model),
            "threads": self.options.threads,
            "dtype": "bfloat16",
            "max_model_len": 2048,
            "max_num_seqs": 64,
            "token_limit": token_limit(self.options.model),
            "work": str(WORK),
        }
        try:
            answer = workers[engine.name].load(request)
        except WorkerError as error:
            record.failure = str(error)
            note(record.failure)
            workers.pop(engine.name).end()
            return
        record.version, record.load_s = answer["version"], answer["seconds"]

    def _run_case(
        self, case: Case, round_index: int, workers: dict[str, Worker], records: dict[str, EngineRecord]
    ) -> None:
        """Each engine once, in an order that turns with the rounds. Round -1 warms up and samples memory instead."""
        names = list(workers)
        turn = max(round_index, 0) % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            worker = workers[name]
            try:
                if round_index < 0:
                    with worker.memory.watch():
                        worker.generate(case.batch, case.prompt_len, case.output_len, self._next_seed())
                    continue
                sample = self._sample(worker, case)
            except WorkerError as error:
                records[name].failure = str(error)
                note(str(error))
                workers.pop(name).end()
                continue
            records[name].samples.setdefault(case.name, []).append(sample)
            shown = figures(case, [sample])
            note(f"round {round_index + 1} {case.name:12} {name:13} {shown.end_to_end:9.1f} tokens/s")

    def _sample(self, worker: Worker, case: Case) -> Sample:
        first_s = 0.0
        if case.is_decode:
            first_s = worker.generate(case.batch, case.prompt_len, 1, self._next_seed())
        return Sample(worker.generate(case.batch, case.prompt_len, case.output_len, self._next_seed()), first_s)

    def _next_seed(self) -> int:
        self.seed += 1
        return self.seed

    def measure_limits(self) -> None:
        """The machine's limits at this moment, beside the rounds; all workers are paused now."""
        command = [sys.executable, str(LIMITS_SCRIPT), "--model", str(self.options.model)]
        command += ["--threads", str(self.options.threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        self.limits.append(json.loads(done.stdout))

    def result(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        facts = machine_facts(self.options.model, self.options.threads)
        settings = {"rounds": self.options.rounds, "cases": [asdict(case) for case in self.cases]}
        return {
            "kind": "offline",
            **facts,
            **settings,
            "weight_bytes": weight_bytes(self.options.model),
            "busy_share_before_rounds": self.busy,
            "limits": self.limits,
            "engines": [asdict(record) for record in self.records],
        }

    def tables(self) -> list[Table]:
        return offline_tables(self.result())


def note(text: str) -> None:
    """One line of progress on standard error, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--engines", default="penstock,vllm,openvino,transformers,llamacpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default="", help="comma-separated names: one stream,8,32,64,prefill 512")
    parser.add_argument("--short", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine each round")
    parser.add_argument("--name", default="", help="stem of the result files; offline-<model> by default")
    options = parser.parse_args()
    end_on_sigterm()
    options.model = options.model.resolve()
    engines = chosen(options.engines, options.threads)
    available = psutil.virtual_memory().available
    groups = split_into_groups(engines, weight_bytes(options.model), available, buffer_bytes=3 << 30)
    comparison = Comparison(options)
    for index, group in enumerate(groups):
        note(f"group {index + 1} of {len(groups)}: {', '.join(engine.name for engine in group)}")
        comparison.run_group(index, group)
        write_results(options.name or f"offline-{options.model.name}", comparison.result(), comparison.tables())
    for table in comparison.tables():
        print(table.markdown())
    return 1 if any(record.failure for record in comparison.records) else 0


if __name__ == "__main__":
    sys.exit(main())
