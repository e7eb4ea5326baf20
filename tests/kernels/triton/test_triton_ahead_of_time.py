"""Kernels compiled for cards that are not here, in a process of its own: this one's kernels are interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.kernels.triton import aot, moe, sampling
from penstock.kernels.triton.specialization import Specialization

ROOT = Path(__file__).parents[3]
LOG = """\
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    48 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size
"""


def test_the_subset_compiles_for_every_chip(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "tools/compile_kernels.py", "--subset", "--out", str(tmp_path / "kernels")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    assert {kernel["capability"] for kernel in kernels} == {80, 90, 100}
    assert {"codes", "dense"} <= {kernel["name"].split()[0] for kernel in kernels}
    for kernel in kernels:
        assert kernel["cubin_size"] > 0
        assert 0 < kernel["registers"] <= 255
        assert kernel["name"] in (tmp_path / "kernels.md").read_text()


AMD = """
from penstock.kernels.triton import aot
for one in aot.specializations():
    if one.name in ("decode d128 g4 q1 bf16", "prefill d128 g4 bf16", "mla_decode h16"):
        print(aot.compile_for_amd(one))
"""


def test_attention_compiles_for_an_amd_chip_within_its_shared_memory(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", AMD], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sizes = [int(line) for line in done.stdout.split()]
    assert len(sizes) == 3
    assert 0 < max(sizes) <= aot.AMD_SHARED_LIMIT


SUMS = """
import re
from penstock.kernels.triton import aot, norm
for one in norm.specializations():
    if one.name.startswith("rms_norm 4096"):
        text = aot.compiled(one, 90).asm["ttgir"]
        [name] = re.findall(r"\\(tensor<4096xf32, (#[a-z0-9]+)>\\) -> f32", text)
        print(re.search(f"^{name} = (.*)$", text, re.MULTILINE)[1])
"""


def test_a_norm_sums_in_one_order_with_or_without_a_rounding(tmp_path: Path) -> None:
    """Which thread holds what decides the order, and the compiler decides that: the interpreter cannot tell."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", SUMS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    layouts = done.stdout.splitlines()
    assert len(layouts) == 4
    assert len(set(layouts)) == 1


@pytest.mark.parametrize(
    ("kernel", "name"),
    [(moe.count_kernel, "num_pairs"), (moe.sort_kernel, "num_pairs"), (sampling._top_logprobs_kernel, "k")],
)
def test_numbers_of_a_step_compile_nothing_anew(kernel: Any, name: str) -> None:
    assert name in kernel.kwargs["do_not_specialize"]


def test_every_kernel_has_a_name_of_its_own() -> None:
    """One name may stand for two chips that do not overlap."""
    found: list[Specialization] = list(aot.specializations())
    assert len({(one.name, one.min_capability) for one in found}) == len(found)
    assert len(found) > 50


def test_figures_are_read_from_the_compilers_log() -> None:
    assert aot.parse_log(LOG) == {
        "registers": 255, "stack_size": 48, "spill_store_size": 40, "spill_load_size": 44
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"shared_size": 233_000}, "shared memory"),
        ({"spill_store_size": 8}, "spills 8"),
        ({"registers": 256}, "registers"),
    ],
    ids=str,
)
def test_what_is_over_a_limit_is_a_problem(change: dict[str, int], problem: str) -> None:
    kernel = aot.CompiledKernel("x", 90, 4, 3, 1, 1, 100, 200_000, 0, 0, 0, 0.1)
    kernel = aot.msgspec.structs.replace(kernel, **change)
    assert problem in aot.judge(kernel, spills_allowed=False)
    assert bool(problem) == bool(aot.judge(kernel, spills_allowed=False))
    assert ("spills" in problem) <= (aot.judge(kernel, spills_allowed=True) == "")
