#!/usr/bin/env python3
"""How long Penstock takes to start: `--help`, the bundled model, a checkpoint beside the time that reading it takes.

    startup.py [--model DIR] [--rounds 5]

The measuring is penstock.bench.startup's (`penstock bench start`); here it is held against the project's bounds. The
checkpoint is read once beforehand, so that it is in the page cache for both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from penstock.bench.startup import measure

RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).resolve().parent / "results"))


def show(result: dict[str, Any]) -> str:
    """A markdown table with the issue's bounds."""
    middle = {name: statistics.median(values) for name, values in result["seconds"].items()}
    rows = [
        ("`penstock --help`", middle["help"], 0.3, "0.3 s"),
        ("bundled model ready", middle["bundled"], 3.0, "3 s"),
    ]
    if "checkpoint" in middle:
        bound = 1.5 * middle["read"] + 2.0
        rows.append(
            (f"{result['model']} ready", middle["checkpoint"], bound, f"1.5 x {middle['read']:.2f} s (read) + 2 s")
        )
    lines = ["| what | median s | bound s | bound | holds |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {what} | {seconds:.2f} | {bound:.2f} | {text} | {'yes' if seconds <= bound else 'no'} |"
        for what, seconds, bound, text in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint directory; without it only the bundled model")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    result = measure(options.model, options.rounds)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "startup.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "startup.md").write_text(show(result))
    print(show(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
