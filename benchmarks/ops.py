#!/usr/bin/env python3
"""Every op beside torch and beside the machine's limit: `penstock bench ops`, with its results in benchmarks/results/
(ops.json, ops.md, and ops.html with the roofline).

ops.py [--threads 2] [--isa NAME] [--only TEXT] [--seconds 0.4]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from penstock.bench.roofline import markdown, roofline_page, run_ops

RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).resolve().parent / "results"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--isa", default=None)
    parser.add_argument("--only", default="", help="cases whose op and shape contain this")
    parser.add_argument("--seconds", type=float, default=0.4, help="per case")
    options = parser.parse_args()
    found = run_ops(options.threads, options.isa, options.only, options.seconds, lambda line: print(line, flush=True))
    if not options.only:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "ops.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "ops.md").write_text(markdown(found))
        (RESULTS / "ops.html").write_text(roofline_page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
