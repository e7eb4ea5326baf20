"""The script for a card runs dry, so that it works when there is one; its kernels' part has a test of its own."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from delayed_device import DelayedBackend, delayed_device
from penstock.runner import graph_policy, model_runner

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
    peers = ("transformers generate, batch 3", "transformers continuous batching, batch 3")
    for what in ("decode step, batch 3", "prefill of 40", "shared prefix", *peers):
        assert what in told
    assert "a dry run" in found["facts"]["card"]
    assert "| float32 decode step, batch 1 |" in (tmp_path / "gpu.md").read_text()


def test_decode_steps_are_timed_once_they_are_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = DelayedBackend()
    monkeypatch.setattr(model_runner, "step_device", lambda config, _device: delayed_device(config, backend))
    monkeypatch.setattr(graph_policy, "MIN_USES", 2)
    script = runpy.run_path(str(ROOT / "benchmarks/gpu/run.py"))
    sizes = script["Sizes"](batches=(2,), context=5, decode_steps=4, captured_after=4, prefill=16, shared_prefix=16)
    core, config, _ = script["build"](tmp_path, True, sizes, None)
    report = script["Report"]({})
    script["time_decode"](report, script["Steps"](core, config), config, ("", 16, 2), sizes, (1e9, 1e9))
    assert report.rows[0]["replayed"] >= 0.7
    core.close()
