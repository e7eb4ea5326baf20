"""The timing script's cases hold together: shapes that the kernels take, floors that are numbers."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks/gpu/kernels.py"


def test_cases_can_be_made_and_run() -> None:
    cases = list(runpy.run_path(str(SCRIPT))["Bench"]("cpu", tiny=True).cases())
    assert all(case.nbytes > 0 for case in cases)
    ran = {}
    for case in cases:
        kind = case.name.split()[0]
        if kind not in ran and kind not in ("prefill", "sample"):
            ran[kind] = case.run()
    assert {"decode", "add_rms_norm", "rope_and_cache", "mla_decode", "full_attention", "top_logprobs"} <= set(ran)
