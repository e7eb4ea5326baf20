#!/usr/bin/env python3
"""Runs the benchmarks one after another: `make bench` is `run.py --short`.

    run.py --short                    ops, and the offline comparison in small: under 15 minutes
    run.py [--model DIR]              everything, also scheduler, prefix cache, server and its overhead, start-up;
                                      an hour and more

Peers take part when their environments exist (benchmarks/peers/setup.sh). The model is --model, else
$BENCH_MODEL, else benchmarks/work/llama3.2-1b where it exists, else a tiny checkpoint that is made here.
Results go to benchmarks/results/ (or $BENCH_RESULTS).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = Path(os.environ.get("BENCH_WORK", HERE / "work"))
SHORT_BUDGET_S = 14 * 60.0


@dataclass(frozen=True)
class Step:
    """One script and its arguments."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()


def tiny_model() -> Path:
    """A tiny checkpoint, made on first use."""
    target = WORK / "tiny"
    if not (target / "config.json").exists():
        command = [sys.executable, str(HERE / "make_checkpoint.py"), "tiny", str(target)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def default_model() -> Path:
    if from_environment := os.environ.get("BENCH_MODEL"):
        return Path(from_environment)
    full = WORK / "llama3.2-1b"
    return full if (full / "config.json").exists() else tiny_model()


def steps(options: argparse.Namespace) -> list[Step]:
    """What to run, in order."""
    model = ("--model", str(options.model), "--threads", str(options.threads))
    offline = Step("offline", "peers/offline.py", (*model, "--engines", options.engines))
    if options.short:
        short = (*offline.arguments, "--short", "--rounds", "2", "--patience", "5", "--name", "short")
        return [Step("ops", "ops.py"), Step("offline", offline.script, short)]
    tiny = ("--model", str(tiny_model()), "--threads", str(options.threads), "--overhead")
    return [
        Step("ops", "ops.py"),
        Step("scheduler", "scheduler.py"),
        Step("prefix cache", "prefix_cache.py"),
        offline,
        Step("server", "peers/server.py", model),
        Step("server overhead", "peers/server.py", (*tiny, "--name", "server-overhead")),
        Step("start-up", "startup.py", ("--model", str(options.model))),
    ]


def run_step(step: Step, deadline: float) -> str:
    """Runs it with its output shown; "" when all went well, else what went wrong."""
    print(f"\n## {step.name}: {step.script} {' '.join(step.arguments)}\n", flush=True)
    command = [sys.executable, str(HERE / step.script), *step.arguments]
    process = subprocess.Popen(command)
    try:
        status = process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        # The comparisons end their engines on SIGTERM.
        process.terminate()
        process.wait()
        return "stopped: the time for this run is over"
    return "" if status == 0 else f"ended with {status}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--model", type=Path, default=None, help="checkpoint directory")
    parser.add_argument("--engines", default="penstock,vllm,openvino,transformers,llamacpp")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    options.model = options.model or default_model()
    deadline = time.monotonic() + (SHORT_BUDGET_S if options.short else 24 * 3600.0)
    failures = {}
    for step in steps(options):
        if failure := run_step(step, deadline):
            failures[step.name] = failure
    for name, failure in failures.items():
        print(f"{name}: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
