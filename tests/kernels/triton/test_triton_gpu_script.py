"""The script for a card runs dry, so that it works when there is one; its kernels' part has a test of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_script_runs_dry_and_writes_its_report(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gpu/run.py"),
        "--dry",
        "--out",
        str(tmp_path),
        "--skip",
        "kernels",
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    told = " ".join(row["what"] for row in found["rows"])
    for what in ("decode step, batch 3", "prefill of 40", "shared prefix"):
        assert what in told
    assert "a dry run" in found["facts"]["card"]
    assert "| float32 decode step, batch 1 |" in (tmp_path / "gpu.md").read_text()
