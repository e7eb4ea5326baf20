#!/usr/bin/env python3
"""What the HTTP side of a server costs: processor time of its API process, not of its engine, for each streamed token.

    api_cost.py --model TINY_DIR [--engines penstock,vllm] [--concurrency 64] [--rounds 3]

User and system time of the process that was started, read before and after a load; its children (the engine) are left
out. With a tiny model the API process is what is busy. The servers run one after the other, the first round is not
counted. Writes benchmarks/results/api-cost.json and .md, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import psutil
from engines import HERE, Engine, chosen
from offline import token_limit
from process_tree import end_on_sigterm
from report import machine_facts

from server import Server, ServerCase, command_of, free_port, served_copy

RESULTS = HERE.parent / "results"


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def measure(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """The rounds of one server: microseconds of its API process for each output token."""
    model, tokens = served_copy(options.model), token_limit(options.model)
    port = free_port()
    server = Server(f"{engine.name}-api", command_of(engine, model, port, 2, True), engine.environment(), port)
    rounds: list[float] = []
    try:
        ready_s = server.wait_until_ready()
        for number in range(options.rounds + 1):
            case = ServerCase("api", options.requests, options.concurrency, 16, 64)
            before = cpu_s(server.process.pid)
            summary = server.load(case, number, tokens)
            spent = cpu_s(server.process.pid) - before
            if number:
                rounds.append(1e6 * spent / summary["output_tokens"])
    finally:
        server.tree.end()
    return {"engine": engine.name, "ready_s": ready_s, "us_per_token": rounds, "last": summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--engines", default="penstock,vllm")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    end_on_sigterm()
    records = [measure(engine, options) for engine in chosen(options.engines, 2)]
    title = f"API process, {options.concurrency} streams at once, {options.requests} requests of 16+64 tokens"
    lines = [f"# {title}", "", "| server | microseconds of the API process a token | rounds |", "| --- | --- | --- |"]
    for record in records:
        figures = record["us_per_token"]
        shown = ", ".join(f"{figure:.1f}" for figure in figures)
        lines.append(f"| {record['engine']} | {statistics.median(figures):.1f} | {shown} |")
    facts = machine_facts(options.model, 2)
    lines += ["", json.dumps(facts, default=str), ""]
    RESULTS.joinpath("api-cost.md").write_text("\n".join(lines))
    RESULTS.joinpath("api-cost.json").write_text(
        json.dumps({"facts": facts, "records": records}, default=str, indent=1)
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
